//! Several domains in one process, for tests.
