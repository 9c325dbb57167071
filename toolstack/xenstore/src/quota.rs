//! How much of the store a domain may use.

/// Limits for one unprivileged domain. The control domain has none.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Quotas {
    /// Nodes that the domain owns.
    pub nodes: usize,
    /// Bytes of these nodes: names, values, permissions and a fixed cost each.
    pub node_bytes: usize,
    /// Bytes of one value.
    pub value_bytes: usize,
    /// Entries in a node's permissions.
    pub permissions: usize,
    /// Watches.
    pub watches: usize,
    /// Bytes of these watches' paths and tokens.
    pub watch_bytes: usize,
    /// Open transactions.
    pub transactions: usize,
    /// Bytes that its open transactions may hold together: changes, changed nodes, and notes of
    /// what they looked at.
    pub transaction_bytes: usize,
    /// Bytes of old versions of nodes that are kept for a transaction while others change
    /// them. A transaction that needs more ends with `EAGAIN`.
    pub history_bytes: usize,
    /// Bytes of events that wait for the domain. When there are more, they are merged into one
    /// event per watch.
    pub event_bytes: usize,
}

impl Default for Quotas {
    fn default() -> Self {
        Self {
            nodes: 1000,
            node_bytes: 256 << 10,
            value_bytes: 2048,
            permissions: 8,
            watches: 128,
            watch_bytes: 32 << 10,
            transactions: 10,
            transaction_bytes: 128 << 10,
            history_bytes: 512 << 10,
            event_bytes: 16 << 10,
        }
    }
}
