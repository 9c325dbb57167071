//! Wake-ups of rings under every interleaving that the memory model allows. Bounds: two requests,
//! one thread per side, up to three preemptions.

use crate::model;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicBool, Ordering};
use loom::thread;
use shmem::Page;
use shmem::inflight::{Identity, InflightTable};
use shmem::ring::{BackRing, FrontRing};
use xen_abi::{DomainId, EventPort, GrantRef};

type Front = FrontRing<u32, u32>;
type Back = BackRing<u32, u32>;

const REQUESTS: u32 = 2;

fn rings() -> (Front, Back) {
    let ring = Page::new_zeroed();
    let front = Front::new(ring.clone());
    let identity =
        Identity { frontend: DomainId(1), incarnation: 1, ring: GrantRef(8), port: EventPort(1) };
    let table = InflightTable::new(Page::new_zeroed());
    (front, Back::attach(vec![ring], table, identity).expect("a fresh ring"))
}

/// An event port: set by the peer, taken by its owner, who sleeps while it is clear.
#[derive(Clone)]
struct Port(Arc<AtomicBool>);

impl Port {
    fn new() -> Self {
        Self(Arc::new(AtomicBool::new(false)))
    }

    /// Test-and-set, as the core does it.
    fn notify(&self) {
        self.0.swap(true, Ordering::AcqRel);
    }

    /// Whether there was an event. One who sleeps without one would sleep forever.
    fn take(&self) -> bool {
        self.0.swap(false, Ordering::AcqRel)
    }
}

/// The frontend pushes and tells when asked to; the backend sleeps after `arm` said that nothing
/// is left. When all is done, the backend has everything, or is being woken.
#[test]
fn no_request_notification_is_lost() {
    model(|| {
        let (mut front, mut back) = rings();
        let port = Port::new();
        let to_back = port.clone();
        let pusher = thread::spawn(move || {
            for number in 0..REQUESTS {
                front.push(&(number + 100));
                if front.publish() {
                    to_back.notify();
                }
            }
        });
        let mut taken = 0;
        let drain = |back: &mut Back, taken: &mut u32| {
            loop {
                while let Some(request) = back.take().expect("an honest front") {
                    assert_eq!(request, *taken + 100);
                    *taken += 1;
                }
                if !back.arm() {
                    break;
                }
            }
        };
        drain(&mut back, &mut taken);
        if port.take() {
            drain(&mut back, &mut taken);
        }
        pusher.join().unwrap();
        // Now asleep for good unless an event is pending.
        while taken < REQUESTS {
            assert!(port.take(), "asleep with {} requests in the ring", REQUESTS - taken);
            drain(&mut back, &mut taken);
        }
    });
}

/// The same in the other direction.
#[test]
fn no_response_notification_is_lost() {
    model(|| {
        let (mut front, mut back) = rings();
        for number in 0..REQUESTS {
            front.push(&number);
        }
        let _ = front.publish();
        let port = Port::new();
        let to_front = port.clone();
        let responder = thread::spawn(move || {
            while let Some(request) = back.take().expect("an honest front") {
                back.respond(&(request + 200));
                if back.publish() {
                    to_front.notify();
                }
            }
        });
        let mut taken = 0;
        let drain = |front: &mut Front, taken: &mut u32| {
            loop {
                while let Some(response) = front.take().expect("an honest back") {
                    assert_eq!(response, *taken + 200);
                    *taken += 1;
                }
                if !front.arm() {
                    break;
                }
            }
        };
        drain(&mut front, &mut taken);
        if port.take() {
            drain(&mut front, &mut taken);
        }
        responder.join().unwrap();
        while taken < REQUESTS {
            assert!(port.take(), "asleep with {} responses in the ring", REQUESTS - taken);
            drain(&mut front, &mut taken);
        }
    });
}

/// A slot is used again only after its response was taken, and never read half written.
#[test]
fn slots_are_whole() {
    model(|| {
        let (mut front, mut back) = rings();
        let worker = thread::spawn(move || {
            let mut done = 0;
            while let Some(request) = back.take().expect("an honest front") {
                assert_eq!(request, done + 100);
                back.respond(&(done + 200));
                let _ = back.publish();
                done += 1;
            }
        });
        let mut taken = 0;
        for number in 0..REQUESTS {
            front.push(&(number + 100));
            let _ = front.publish();
            while let Some(response) = front.take().expect("an honest back") {
                assert_eq!(response, taken + 200);
                taken += 1;
            }
        }
        worker.join().unwrap();
    });
}
