//! What a new incarnation of a backend does with a device that its predecessor may have served.

use crate::device::DeviceKind;
use xen_abi::xenstore::XenbusState;

/// What to do with one device, by the states of its two ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Takeover {
    /// The frontend works and knows nothing: attach to its rings at `rsp_prod`, answer what is
    /// unanswered, notify each ring once. Write nothing to the store.
    Attach,
    /// Nothing was agreed yet: write the features, then `state` 2.
    Advertise,
    /// The frontend wrote its keys and waits: attach to its rings, then `state` 4.
    Connect,
    /// The frontend closes: `state` 5. When the frontend is at 6, `state` 6.
    FollowClosing,
    /// The frontend is closed: release its resources, `state` 6.
    Release,
    /// The frontend starts anew (its domain rebooted): forget rings and in-flight table, write
    /// the features, `state` 2.
    StartOver,
    /// Nothing to do until a state changes.
    Wait,
}

/// Decides by the state of the backend's end (as the predecessor left it) and of the frontend's.
///
/// | backend | frontend             | answer                         |
/// |---------|----------------------|--------------------------------|
/// | 4       | 4; vbd also 3        | [`Attach`](Takeover::Attach)   |
/// | 0 1 2 3 | 1                    | [`Advertise`](Takeover::Advertise) |
/// | 0 1     | vif 4, vbd 3 or 4    | [`Advertise`](Takeover::Advertise): it waits for our features |
/// | 2 3     | vif 4, vbd 3 or 4    | [`Connect`](Takeover::Connect) |
/// | 4 5 6   | 1                    | [`StartOver`](Takeover::StartOver) |
/// | 0 to 4  | 5                    | [`FollowClosing`](Takeover::FollowClosing) |
/// | 5       | all but 1 and 6      | [`FollowClosing`](Takeover::FollowClosing) |
/// | 0 to 5  | 6                    | [`Release`](Takeover::Release) |
/// | else    |                      | [`Wait`](Takeover::Wait)       |
///
/// A block frontend still at 3 while the backend is at 4 has not seen the 4 yet; its ring is in
/// use. A backend whose toolstack wrote no state counts as Initialising.
///
/// Source: what `xen-blkfront.c`, `xen-netfront.c` and `xenbus_client.c` of Linux 6.1 do when they
/// see a state of the backend.
#[must_use]
pub fn takeover(kind: DeviceKind, backend: XenbusState, frontend: XenbusState) -> Takeover {
    // 0, 1: not advertised; 2, 3: advertised.
    let connected = backend == XenbusState::CONNECTED;
    let advertised = matches!(backend, XenbusState::INIT_WAIT | XenbusState::INITIALISED);
    let fresh = matches!(backend, XenbusState::UNKNOWN | XenbusState::INITIALISING);
    let closing = backend == XenbusState::CLOSING;
    let closed = backend == XenbusState::CLOSED;
    let published = match frontend {
        XenbusState::CONNECTED => true,
        XenbusState::INITIALISED => kind == DeviceKind::Vbd,
        _ => false,
    };
    match frontend {
        XenbusState::INITIALISING if fresh || advertised => Takeover::Advertise,
        XenbusState::INITIALISING if connected || closing || closed => Takeover::StartOver,
        XenbusState::CLOSING if fresh || advertised || connected => Takeover::FollowClosing,
        XenbusState::CLOSED if fresh || advertised || connected || closing => Takeover::Release,
        _ if closing => Takeover::FollowClosing,
        _ if published && connected => Takeover::Attach,
        _ if published && advertised => Takeover::Connect,
        _ if published && fresh => Takeover::Advertise,
        _ => Takeover::Wait,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decide(kind: DeviceKind, backend: u8, frontend: u8) -> Takeover {
        takeover(kind, XenbusState(backend), XenbusState(frontend))
    }

    /// The rows of xen-abi §10.3, for both kinds of device.
    #[test]
    fn every_row_of_the_takeover_table_holds() {
        for kind in [DeviceKind::Vif, DeviceKind::Vbd] {
            assert_eq!(decide(kind, 4, 4), Takeover::Attach);
            assert_eq!(decide(kind, 1, 1), Takeover::Advertise);
            assert_eq!(decide(kind, 2, 1), Takeover::Advertise);
            assert_eq!(decide(kind, 2, 4), Takeover::Connect);
            assert_eq!(decide(kind, 4, 5), Takeover::FollowClosing);
            assert_eq!(decide(kind, 4, 6), Takeover::Release);
            for frontend in [0, 2, 3, 4, 5] {
                assert_eq!(decide(kind, 5, frontend), Takeover::FollowClosing);
            }
            assert_eq!(decide(kind, 5, 6), Takeover::Release);
            for backend in [4, 5, 6] {
                assert_eq!(decide(kind, backend, 1), Takeover::StartOver);
            }
        }
        assert_eq!(decide(DeviceKind::Vbd, 2, 3), Takeover::Connect);
        assert_eq!(decide(DeviceKind::Vif, 2, 3), Takeover::Wait);
    }

    /// A crash between the backend's and the frontend's switch to 4 (§6.4: blkfront goes 3 → 4
    /// when it has seen the backend's 4).
    #[test]
    fn a_block_frontend_that_has_not_seen_connected_is_attached() {
        assert_eq!(decide(DeviceKind::Vbd, 4, 3), Takeover::Attach);
        assert_eq!(decide(DeviceKind::Vif, 4, 3), Takeover::Wait);
    }

    #[test]
    fn a_missing_backend_state_counts_as_initialising() {
        for frontend in 0..10 {
            for kind in [DeviceKind::Vif, DeviceKind::Vbd] {
                assert_eq!(decide(kind, 0, frontend), decide(kind, 1, frontend));
            }
        }
    }

    /// Rings are touched only where the frontend says it has published them.
    #[test]
    fn rings_are_attached_only_when_the_frontend_published_them() {
        for kind in [DeviceKind::Vif, DeviceKind::Vbd] {
            for backend in 0..=255 {
                for frontend in 0..=255 {
                    if matches!(
                        decide(kind, backend, frontend),
                        Takeover::Attach | Takeover::Connect
                    ) {
                        assert!(frontend == 4 || (frontend == 3 && kind == DeviceKind::Vbd));
                        assert!((2..=4).contains(&backend));
                    }
                }
            }
        }
    }
}
