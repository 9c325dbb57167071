//! The frontend that Axolotl's own guests have.

use crate::disk::{geometry, medium};
use crate::front::{DEVICE, content};
use crate::rig::{Random, Rig, StoreClient};
use domain_api::DomainId;
use domain_api::fake::Domain;
use frontends::blkfront::{Blkfront, Config, Error, GrantPolicy, Operation, Part};
use xenbus::Store;

const GUEST: DomainId = DomainId(3);
/// Extents of 16 sectors.
const EXTENTS: u64 = 64;

struct Guest {
    env: Domain,
    client: StoreClient,
    front: Blkfront,
    /// Extents that are still to be written or read.
    left: Vec<u64>,
    answered: u64,
}

impl Guest {
    fn boot(rig: &mut Rig, config: Config) -> Self {
        rig.add_device(GUEST, "range:64K+512K", "w");
        let (env, mut client) = (rig.world.domain(GUEST), rig.store.client(GUEST));
        let front = Blkfront::new(&mut client, GUEST, DEVICE, config).unwrap();
        Self { env, client, front, left: Vec::new(), answered: 0 }
    }

    fn turn(&mut self, operation: Operation) -> bool {
        let mut worked = false;
        while let Some(event) = self.client.next_event() {
            self.front.store_event(&mut self.env, &mut self.client, &event).unwrap();
            worked = true;
        }
        for port in self.env.take_pending() {
            worked |= self.front.event(port);
        }
        if self.front.is_connected() {
            self.complete();
            self.request(operation);
            self.front.kick(&mut self.env);
        }
        worked
    }

    fn complete(&mut self) {
        while let Some(completion) = self.front.complete(&mut self.env).unwrap() {
            completion.result.unwrap();
            for (at, part) in (0..).zip(completion.parts) {
                let sector = completion.tag * 16 + at * 8;
                for (index, sector) in (0..8).zip(sector..) {
                    let mut bytes = [0; 512];
                    part.buffer.page().read(index * 512, &mut bytes);
                    assert!(bytes == content(sector, 1), "sector {sector}");
                }
                self.front.give_back(part.buffer);
            }
            self.answered += 1;
        }
    }

    fn request(&mut self, operation: Operation) {
        while self.front.free_buffers() >= 2
            && let Some(extent) = self.left.pop()
        {
            let parts: Vec<Part> = (0..2)
                .map(|at| {
                    let buffer = self.front.take_buffer().unwrap();
                    for (index, sector) in (0..8).zip(extent * 16 + at * 8..) {
                        let bytes = if operation == Operation::Write {
                            content(sector, 1)
                        } else {
                            [0; 512]
                        };
                        buffer.page().write(index * 512, &bytes);
                    }
                    Part::whole(buffer)
                })
                .collect();
            let done = match operation {
                Operation::Write => self.front.write(&mut self.env, extent, extent * 16, parts),
                _ => self.front.read(&mut self.env, extent, extent * 16, parts),
            };
            if let Err(refused) = done {
                assert_eq!(refused.error, Error::Full);
                refused.parts.into_iter().for_each(|part| self.front.give_back(part.buffer));
                self.left.push(extent);
                return;
            }
        }
    }
}

/// Writes everything, then reads everything, while the backend dies again and again.
#[test]
fn our_own_frontend_does_not_notice_deaths() {
    let mut kills = 0;
    for (grants, queues, ring_page_order) in
        [(GrantPolicy::Persistent, 1, 0), (GrantPolicy::PerRequest, 3, 2)]
    {
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        let mut rig = Rig::new(vec![medium(geometry(2048, 512))], 1);
        let config = Config { grants, queues, ring_page_order, ..Config::default() };
        let mut guest = Guest::boot(&mut rig, config);
        while rig.step() | guest.turn(Operation::Read) {}
        assert_eq!(guest.front.info().sectors, 1024);
        for operation in [Operation::Write, Operation::Read] {
            guest.left = (0..EXTENTS).collect();
            guest.answered = 0;
            for _ in 0..20_000 {
                if guest.answered == EXTENTS {
                    break;
                }
                if random.below(6) == 0 {
                    rig.fuse.light(random.below(30));
                }
                rig.step();
                guest.turn(operation);
                while rig.back.is_none() {
                    rig.start_back();
                }
            }
            assert_eq!(guest.answered, EXTENTS);
        }
        rig.fuse.put_out();
        kills += rig.kills;
        while rig.step() | guest.turn(Operation::Read) {}
        guest.front.close(&mut guest.env, &mut guest.client).unwrap();
        while rig.step() | guest.turn(Operation::Read) {}
        assert_eq!(guest.env.grants(), 0);
    }
    assert!(kills > 10, "only {kills} kills");
}
