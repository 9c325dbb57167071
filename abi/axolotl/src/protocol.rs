//! The messages between `axl` and the control domain.
