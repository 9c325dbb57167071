//! The control domain of a simulation: builds the others, writes their nodes to the store, and
//! starts again whoever dies, in the order of architecture §6.

use crate::domain::{Domain, Start, XenstoreRing};
use crate::random::Random;
use crate::world::{ENTRY, Main, World};
use axolotl_abi::CONTROL_OP;
use axolotl_abi::control::{
    self, ASSIGN_DMA_TRUSTED, AssignDevice, Create, DomainInfo, DomainOp, KIND_UNIKERNEL, Load,
    POPULATE_PRESERVED, Populate, STATE_DEAD, SetGrant, SetStart,
};
use axolotl_abi::image::{ACCESS_EXECUTE, ACCESS_READ, ACCESS_WRITE};
use axolotl_abi::start::{
    HEAP_GPA, IMAGE_GPA, MMIO_GPA, PRESERVED_GPA, STACK_TOP_GPA, START_INFO_GPA, XENSTORE_RING_GPA,
};
use domain_api::{DomainId, Errno, EventPort, GrantRef};
use hv_core::platform::Bdf;
use std::rc::Rc;
use xen_abi::Gfn;
use xen_abi::event::{ALLOC_UNBOUND, AllocUnbound, VIRQ_DOM_EXC};
use xen_abi::hypercall::EVENT_CHANNEL_OP;
use xen_abi::xenstore::{CONNECTION, RECONNECT};
use xenbus::{Client, Nodes, Permission, Store};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

/// The control domain.
pub const CONTROL: DomainId = DomainId(0);
/// The store domain.
pub const STORE: DomainId = DomainId(1);
/// Pages of the control domain's heap that it uses here.
pub const CONTROL_HEAP: u64 = 16;

/// A domain to be built.
pub struct Blueprint {
    /// Its id.
    pub id: DomainId,
    /// Its name.
    pub name: &'static str,
    /// `CLASS_*`.
    pub class: u8,
    /// Pages of heap.
    pub heap_pages: u32,
    /// Preserved pages.
    pub preserved_pages: u32,
    /// Its device.
    pub device: Option<Bdf>,
    /// Whether it may die.
    pub mortal: bool,
    /// Its code.
    pub main: Main,
}

/// A node of the store, with its owner and who else may read it.
pub struct Node {
    /// Where.
    pub path: String,
    /// Its value; `None`: a directory.
    pub value: Option<String>,
    /// Whose.
    pub owner: DomainId,
    /// Who reads.
    pub reader: DomainId,
}

/// What the control domain does after each start of a mortal domain: decides when it dies.
pub type Fate = Rc<dyn Fn(&World, DomainId)>;

/// The control domain.
pub struct Control {
    world: Rc<World>,
    domain: Domain,
    random: Random,
    built: Vec<Blueprint>,
    fate: Fate,
}

impl Control {
    /// Its code: builds `blueprints`, the first of which is the store domain, and supervises.
    pub fn run(
        world: &Rc<World>,
        domain: Domain,
        random: Random,
        blueprints: Vec<Blueprint>,
        nodes: &[Node],
        fate: Fate,
    ) {
        let deaths = domain.bind_virq(VIRQ_DOM_EXC).expect("deaths are told to the control domain");
        let world = world.clone();
        let mut control = Self { world, domain, random, built: Vec::new(), fate };
        let mut client = None;
        for blueprint in blueprints {
            let store_port = control.build(&blueprint);
            control.fill(&blueprint, 1, store_port);
            if let Some(client) = &mut client {
                control.start(&blueprint, store_port, client);
            } else {
                control.op(control::UNPAUSE, &mut DomainOp { domid: blueprint.id });
                let mut connected = Client::new(control.domain.xenstore());
                write_nodes(&mut connected, nodes);
                client = Some(connected);
            }
            control.built.push(blueprint);
        }
        let mut client = client.expect("there is a store");
        loop {
            for port in control.domain.wait(None) {
                // Again, for events that came meanwhile were not kept.
                while port == deaths && control.revive(&mut client) {}
            }
        }
    }

    fn op<T: FromBytes + IntoBytes + Immutable>(&self, operation: u64, argument: &mut T) {
        for _ in 0..10_000 {
            match self.domain.call(CONTROL_OP, operation, argument) {
                Err(Errno::EAGAIN) => {}
                Err(errno) => panic!("control operation {operation}: {errno}"),
                Ok(_) => return,
            }
        }
        panic!("control operation {operation} never ends");
    }

    fn populate(&self, domid: DomainId, gpa: u64, count: u32, access: u32, flags: u32) {
        if count > 0 {
            let gfn = Gfn::containing(gpa).0;
            let mut op = Populate { domid, pad: 0, access, flags, count, gfn, done: 0 };
            self.op(control::POPULATE, &mut op);
        }
    }

    fn build(&self, blueprint: &Blueprint) -> EventPort {
        let Blueprint { id, heap_pages, preserved_pages, .. } = *blueprint;
        let mut create = Create::new_zeroed();
        create.name[..blueprint.name.len()].copy_from_slice(blueprint.name.as_bytes());
        (create.domid, create.kind, create.class) = (id, KIND_UNIKERNEL, blueprint.class);
        create.max_pages = heap_pages + preserved_pages + 80;
        self.op(control::CREATE, &mut create);
        let data = ACCESS_READ | ACCESS_WRITE;
        self.populate(id, IMAGE_GPA, 1, ACCESS_READ | ACCESS_EXECUTE, 0);
        self.populate(id, XENSTORE_RING_GPA, 1, data, 0);
        self.populate(id, HEAP_GPA, heap_pages, data, 0);
        self.populate(id, PRESERVED_GPA, preserved_pages, data, POPULATE_PRESERVED);
        if let Some(Bdf(bdf)) = blueprint.device {
            let flags = ASSIGN_DMA_TRUSTED;
            let mut op = AssignDevice { domid: id, pad: 0, bdf, flags, pad2: 0, gpa: MMIO_GPA };
            self.op(control::ASSIGN_DEVICE, &mut op);
        }
        let start = Start {
            id,
            incarnation: 1,
            store_port: EventPort(0),
            heap_pages: heap_pages.into(),
            preserved_pages: preserved_pages.into(),
        };
        self.world.install(start, blueprint.name, blueprint.mortal, blueprint.main.clone());
        if id == STORE { self.domain.start().store_port } else { self.alloc_port(id) }
    }

    fn alloc_port(&self, dom: DomainId) -> EventPort {
        let mut op = AllocUnbound { dom, remote_dom: STORE, port: EventPort(0) };
        self.domain.call(EVENT_CHANNEL_OP, ALLOC_UNBOUND, &mut op).expect("a port for the store");
        op.port
    }

    /// What a domain finds at its start.
    fn fill(&self, blueprint: &Blueprint, incarnation: u32, store_port: EventPort) {
        let id = blueprint.id;
        if id != STORE {
            let source = self.domain.point_at(&RECONNECT.to_le_bytes());
            let gpa = XENSTORE_RING_GPA + CONNECTION as u64;
            self.op(control::LOAD, &mut Load { domid: id, pad: 0, len: 4, gpa, source });
            let gfn = Gfn::containing(XENSTORE_RING_GPA).0;
            let mut op = SetGrant { domid: id, grantee: STORE, gref: GrantRef(1), gfn };
            self.op(control::SET_GRANT, &mut op);
        }
        self.world.set_start(Start {
            id,
            incarnation,
            store_port,
            heap_pages: blueprint.heap_pages.into(),
            preserved_pages: blueprint.preserved_pages.into(),
        });
        let stack = STACK_TOP_GPA - 8;
        let mut op =
            SetStart { domid: id, pad: [0; 3], entry: ENTRY, stack, argument: START_INFO_GPA };
        self.op(control::SET_START, &mut op);
    }

    fn start(&mut self, blueprint: &Blueprint, port: EventPort, client: &mut Client<XenstoreRing>) {
        let id = blueprint.id;
        (self.fate)(&self.world, id);
        let early = self.random.one_in(2);
        if early {
            self.op(control::UNPAUSE, &mut DomainOp { domid: id });
        }
        let ring = Gfn::containing(XENSTORE_RING_GPA);
        match client.introduce(id, ring, port) {
            // It died meanwhile; its next life is introduced again.
            Err(Errno::EINVAL) if early => {}
            result => result.expect("the store takes every domain"),
        }
        if !early {
            self.op(control::UNPAUSE, &mut DomainOp { domid: id });
        }
    }

    /// Starts the next life of everybody who is dead. True: somebody was.
    fn revive(&mut self, client: &mut Client<XenstoreRing>) -> bool {
        let mut any = false;
        let built = std::mem::take(&mut self.built);
        for blueprint in built.iter().filter(|blueprint| blueprint.id != STORE) {
            let mut info = DomainInfo::new_zeroed();
            info.domid = blueprint.id;
            self.op(control::GET_INFO, &mut info);
            if info.domid != blueprint.id || info.state != STATE_DEAD {
                continue;
            }
            if self.random.one_in(4) {
                // What was ready before the domain is back must be found by itself.
                let until = self.domain.now_ns() + self.random.magnitude(5_000_000);
                while self.domain.now_ns() < until {
                    self.domain.wait(Some(until)).for_each(drop);
                }
            }
            any = true;
            self.op(control::RESTART, &mut DomainOp { domid: blueprint.id });
            let port = self.alloc_port(blueprint.id);
            self.fill(blueprint, info.incarnation + 1, port);
            self.start(blueprint, port, client);
        }
        self.built = built;
        any
    }
}

fn write_nodes(client: &mut Client<XenstoreRing>, nodes: &[Node]) {
    for node in nodes {
        match &node.value {
            Some(value) => client.write(&node.path, value.as_bytes()),
            None => client.mkdir(&node.path),
        }
        .expect("the control domain may write everything");
        let mut permissions = vec![Permission::owner(node.owner)];
        if node.reader != node.owner {
            permissions.push(Permission::reader(node.reader));
        }
        if node.value.is_none() {
            client.set_perms(&node.path, &permissions).expect("it may set permissions");
        }
    }
}

/// Nodes of a system, as the toolstack writes them.
#[derive(Default)]
pub struct Tree(pub Vec<Node>);

impl Tree {
    /// A directory; what is written below takes its permissions.
    pub fn directory(&mut self, path: &str, owner: DomainId, reader: DomainId) {
        self.0.push(Node { path: path.into(), value: None, owner, reader });
    }

    /// A value in a directory.
    pub fn value(&mut self, directory: &str, key: &str, value: impl ToString) {
        let (path, value) = (format!("{directory}/{key}"), Some(value.to_string()));
        self.0.push(Node { path, value, owner: CONTROL, reader: CONTROL });
    }

    /// The home of a domain.
    pub fn home(&mut self, id: DomainId) {
        let path = format!("/local/domain/{}", id.0);
        self.directory(&path, CONTROL, id);
        self.value(&path, "domid", id.0);
        for name in ["backend", "data", "error"] {
            self.directory(&format!("{path}/{name}"), id, id);
        }
    }
}
