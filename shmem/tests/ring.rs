//! Both ends of a ring against each other, and against liars; crashes of the backend at every
//! step.
#![cfg(not(loom))]

use proptest::collection::vec;
use proptest::prelude::*;
use shmem::inflight::{ENTRIES, Identity, InflightTable};
use shmem::ring::{BackRing, FrontRing};
use shmem::{Page, PeerError};
use std::collections::VecDeque;
use xen_abi::netif::{TxRequest, TxResponse};
use xen_abi::ring::{REQ_PROD, RSP_PROD, SLOTS};
use xen_abi::{DomainId, EventPort, GrantRef};

type Front = FrontRing<TxRequest, TxResponse>;
type Back = BackRing<TxRequest, TxResponse>;

const CASES: u32 = if cfg!(miri) { 2 } else { 300 };
const STEPS: usize = if cfg!(miri) { 60 } else { 600 };
const ME: Identity =
    Identity { frontend: DomainId(3), incarnation: 1, ring: GrantRef(8), port: EventPort(5) };

fn request(number: u32) -> TxRequest {
    let id = u16::try_from(number & 0xffff).expect("masked");
    TxRequest { gref: GrantRef(number), offset: !id, flags: id.rotate_left(3), id, size: id ^ 0x55 }
}

/// Where in its work the backend dies.
#[derive(Clone, Copy, Debug)]
enum Crash {
    /// Between two steps.
    Clean,
    /// After so many bytes of the next response were written.
    TornResponse(usize),
    /// After so many bytes of the next entry of the in-flight table were written.
    TornCopy(usize),
    /// While attaching, before the first request.
    Twice,
}

#[derive(Clone, Debug)]
enum Step {
    Push(u32),
    ShowRequests,
    TakeRequest,
    Respond,
    ShowResponses,
    TakeResponse,
    Crash(Crash),
}

fn step() -> impl Strategy<Value = Step> {
    let crash = prop_oneof![
        Just(Crash::Clean),
        (1_usize..=4).prop_map(Crash::TornResponse),
        (1_usize..=12).prop_map(Crash::TornCopy),
        Just(Crash::Twice),
    ];
    prop_oneof![
        6 => (1_u32..40).prop_map(Step::Push),
        4 => Just(Step::ShowRequests),
        24 => Just(Step::TakeRequest),
        20 => Just(Step::Respond),
        4 => Just(Step::ShowResponses),
        16 => Just(Step::TakeResponse),
        2 => crash.prop_map(Step::Crash),
    ]
}

/// The real rings, and what must come out of them.
struct Model {
    ring: Page,
    table: Page,
    front: Front,
    back: Option<Back>,
    pushed: u32,
    /// Taken by the backend's present incarnation, not answered.
    working: VecDeque<u32>,
    next_taken: u32,
    answered: u32,
    published: u32,
    responses: u32,
}

impl Model {
    /// Starts at `index` as if the ring had been in use for long.
    fn new(index: u32) -> Self {
        let (ring, table) = (Page::new_zeroed(), Page::new_zeroed());
        let front = Front::new(ring.clone());
        let mut model = Self {
            ring,
            table,
            front,
            back: None,
            pushed: 0,
            working: VecDeque::new(),
            next_taken: 0,
            answered: 0,
            published: 0,
            responses: 0,
        };
        model.attach();
        for _ in 0..index {
            model.run(&Step::Push(1));
            for step in [
                Step::ShowRequests,
                Step::TakeRequest,
                Step::Respond,
                Step::ShowResponses,
                Step::TakeResponse,
            ] {
                model.run(&step);
            }
        }
        model
    }

    fn back(&mut self) -> &mut Back {
        self.back.as_mut().expect("attached")
    }

    fn attach(&mut self) {
        let table = InflightTable::new(self.table.clone());
        let back = Back::attach(vec![self.ring.clone()], table, ME).expect("an honest front");
        self.back = Some(back);
        self.working.clear();
        self.next_taken = self.published;
        self.answered = self.published;
    }

    fn crash(&mut self, crash: Crash) {
        let junk = [0xa5; 12];
        self.back = None;
        match crash {
            Crash::Clean => {}
            // Only a response that was due can have been begun.
            Crash::TornResponse(_) if self.working.is_empty() => {}
            Crash::TornResponse(bytes) => {
                let slot = self.answered as usize % 256;
                self.ring.write(SLOTS + slot * 12, &junk[..bytes]);
            }
            // Only a request that was there can have been under copy. The entry to be written is
            // that of a request which was answered long ago.
            Crash::TornCopy(_) if self.next_taken == self.pushed => {}
            Crash::TornCopy(_) if self.next_taken < self.table_consumed() => {}
            Crash::TornCopy(bytes) => {
                let entry = self.next_taken as usize % 256;
                self.table.write(ENTRIES + entry * 12, &junk[..bytes]);
            }
            Crash::Twice => {
                self.attach();
                self.back = None;
            }
        }
        self.attach();
    }

    fn table_consumed(&self) -> u32 {
        self.table.u32(20).load(std::sync::atomic::Ordering::Relaxed)
    }

    fn run(&mut self, step: &Step) {
        match *step {
            Step::Push(count) => {
                for _ in 0..count.min(self.front.free()) {
                    assert_eq!(self.front.push(&request(self.pushed)), self.pushed);
                    self.pushed += 1;
                }
            }
            Step::ShowRequests => {
                let _ = self.front.publish();
            }
            Step::TakeRequest => {
                if let Some(taken) = self.back().take().expect("an honest front") {
                    assert_eq!(taken, request(self.next_taken));
                    self.working.push_back(self.next_taken);
                    self.next_taken += 1;
                }
            }
            Step::Respond => {
                if let Some(number) = self.working.pop_front() {
                    let id = request(number).id;
                    self.back().respond(&TxResponse { id, status: 0 });
                    self.answered += 1;
                }
            }
            Step::ShowResponses => {
                let _ = self.back().publish();
                self.published = self.answered;
            }
            Step::TakeResponse => {
                if let Some(response) = self.front.take().expect("an honest back") {
                    assert_eq!(response.id, request(self.responses).id);
                    self.responses += 1;
                }
            }
            Step::Crash(crash) => self.crash(crash),
        }
    }

    /// Everybody works until nothing is left.
    fn finish(&mut self) {
        self.run(&Step::ShowRequests);
        while self.responses < self.pushed {
            let before = self.responses;
            for step in [Step::TakeRequest, Step::Respond, Step::ShowResponses, Step::TakeResponse]
            {
                self.run(&step);
            }
            assert!(self.responses > before, "request {before} is lost");
        }
        assert_eq!(self.back().in_flight(), 0);
        assert_eq!(self.front.in_flight(), 0);
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: CASES, failure_persistence: None, ..ProptestConfig::default()
    })]

    /// xen-abi §10.2, R1 to R3: whatever the order of work and wherever the backend dies, each
    /// request is taken whole and in order by some incarnation, and answered exactly once.
    #[test]
    fn no_request_is_lost_doubled_reordered_or_torn(
        start in prop_oneof![Just(0_u32), 250_u32..262],
        steps in vec(step(), 0..STEPS),
    ) {
        let mut model = Model::new(if cfg!(miri) { 0 } else { start });
        for step in &steps {
            model.run(step);
        }
        model.finish();
    }

    /// A frontend that writes any counters gets an error or bounded work, never a panic.
    #[test]
    fn a_lying_front_is_refused(
        counters in vec((any::<u32>(), any::<u32>()), 1..20),
        offsets in vec(0_u32..600, 1..20),
    ) {
        use std::sync::atomic::Ordering::Relaxed;
        let (ring, table) = (Page::new_zeroed(), Page::new_zeroed());
        for &(req, rsp) in &counters {
            ring.u32(REQ_PROD).store(req, Relaxed);
            ring.u32(RSP_PROD).store(rsp, Relaxed);
            let table = InflightTable::new(table.clone());
            let attached = Back::attach(vec![ring.clone()], table, ME);
            let Ok(mut back) = attached else { continue };
            for offset in &offsets {
                ring.u32(REQ_PROD).store(rsp.wrapping_add(*offset), Relaxed);
                let mut taken = 0;
                while let Ok(Some(_)) = back.take() {
                    taken += 1;
                    prop_assert!(taken <= 256);
                }
                while back.in_flight() > 0 {
                    back.respond(&TxResponse { id: 0, status: 0 });
                }
                let _ = back.arm();
            }
        }
    }

    /// The same for a backend that lies to the frontend.
    #[test]
    fn a_lying_back_is_refused(claims in vec(any::<u32>(), 1..20), requests in 0_u32..256) {
        use std::sync::atomic::Ordering::Relaxed;
        let ring = Page::new_zeroed();
        let mut front = Front::new(ring.clone());
        for number in 0..requests {
            front.push(&request(number));
        }
        let _ = front.publish();
        let mut taken = 0;
        for claim in claims {
            ring.u32(RSP_PROD).store(claim, Relaxed);
            while let Ok(Some(_)) = front.take() {
                taken += 1;
            }
            prop_assert!(taken <= requests);
            prop_assert_eq!(front.in_flight(), requests - taken);
        }
    }
}

fn ring_with(requests: u32) -> (Page, Front) {
    let ring = Page::new_zeroed();
    let mut front = Front::new(ring.clone());
    for number in 0..requests {
        front.push(&request(number));
    }
    let _ = front.publish();
    (ring, front)
}

fn attach(ring: &Page, table: &Page, identity: Identity) -> Result<Back, PeerError> {
    Back::attach(vec![ring.clone()], InflightTable::new(table.clone()), identity)
}

/// xen-abi §10.3: a new connection never replays an old one's requests.
#[test]
fn another_connection_starts_the_table_anew() {
    let table = Page::new_zeroed();
    let (old, _front) = ring_with(5);
    let mut back = attach(&old, &table, ME).unwrap();
    while back.take().unwrap().is_some() {}
    drop(back);
    let others = [
        Identity { frontend: DomainId(4), ..ME },
        Identity { incarnation: 1 << 40, ..ME },
        Identity { ring: GrantRef(9), ..ME },
        Identity { port: EventPort(6), ..ME },
    ];
    for identity in others {
        let ring = Page::new_zeroed();
        let mut front = Front::new(ring.clone());
        front.push(&request(77));
        let _ = front.publish();
        let mut back = attach(&ring, &table, identity).unwrap();
        assert_eq!(back.replayed(), 0);
        assert_eq!(back.take().unwrap(), Some(request(77)));
        drop(back);
        let again = attach(&ring, &table, identity).unwrap();
        assert_eq!(again.replayed(), 1, "and its own requests it replays");
    }
}

#[test]
fn a_forgotten_table_replays_nothing() {
    let table = Page::new_zeroed();
    let (ring, _front) = ring_with(3);
    let mut back = attach(&ring, &table, ME).unwrap();
    while back.take().unwrap().is_some() {}
    back.into_table().forget();
    assert_eq!(attach(&ring, &table, ME).unwrap().replayed(), 0);
}

/// xen-abi §7.1: more requests than slots stop the device.
#[test]
fn too_many_requests_are_refused() {
    let (ring, _front) = ring_with(0);
    let mut back = attach(&ring, &Page::new_zeroed(), ME).unwrap();
    ring.u32(REQ_PROD).store(257, std::sync::atomic::Ordering::Relaxed);
    assert_eq!(back.take(), Err(PeerError::BadCounter { claimed: 257, limit: 256 }));
    assert!(attach(&ring, &Page::new_zeroed(), ME).is_err());
}

/// A frontend that changes a slot after it was taken changes nothing.
#[test]
fn a_taken_request_is_a_private_copy() {
    let table = Page::new_zeroed();
    let (ring, _front) = ring_with(1);
    let mut back = attach(&ring, &table, ME).unwrap();
    assert_eq!(back.take().unwrap(), Some(request(0)));
    ring.write(SLOTS, &[0xff; 12]);
    drop(back);
    assert_eq!(attach(&ring, &table, ME).unwrap().take().unwrap(), Some(request(0)));
}

/// Slots of 13 bytes do not divide a page: with two pages one of them straddles the border, in the
/// ring as in the in-flight table.
#[test]
fn a_ring_and_its_table_may_have_several_pages() {
    let two = || vec![Page::new_zeroed(), Page::new_zeroed()];
    let (pages, tables) = (two(), two());
    let mut front = FrontRing::<[u8; 13], [u8; 3]>::with_pages(pages.clone());
    assert_eq!(front.len(), 512);
    let value = |n: u32| core::array::from_fn(|i| n.to_le_bytes()[i % 4] ^ i.to_le_bytes()[0]);
    for n in 0..512 {
        front.push(&value(n));
    }
    let _ = front.publish();
    let attach = || {
        let table = InflightTable::with_pages(tables.clone());
        BackRing::<[u8; 13], [u8; 3]>::attach(pages.clone(), table, ME).unwrap()
    };
    let mut back = attach();
    for n in 0..512 {
        assert_eq!(back.take(), Ok(Some(value(n))));
    }
    for _ in 0..400 {
        back.respond(&[0xaa; 3]);
    }
    drop(back);
    let mut back = attach();
    assert_eq!(back.replayed(), 512);
    for n in 0..512 {
        assert_eq!(back.take(), Ok(Some(value(n))));
        back.respond(&[n.to_le_bytes()[0]; 3]);
    }
    let _ = back.publish();
    for n in 0..512_u32 {
        assert_eq!(front.take(), Ok(Some([n.to_le_bytes()[0]; 3])));
    }
}
