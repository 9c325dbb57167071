//! Random requests against a model that does everything the slow and obvious way.

use super::*;
use crate::tree;
use proptest::{collection::vec, prelude::*};
use std::collections::BTreeMap as Map;
use xenbus::{NodeAccess, Permission};

const CASES: u32 = if cfg!(miri) { 3 } else { 128 };
/// The control domain and two guests.
const DOMAINS: [DomainId; 3] = [DomainId(0), DomainId(5), DomainId(6)];

/// A node of the model: value and permissions.
type Flat = Map<String, (Vec<u8>, Vec<Permission>)>;

#[derive(Clone, Debug)]
enum Op {
    Read(String),
    List(String),
    Write(String, u8),
    Mkdir(String),
    Remove(String),
    SetPerms(String, Vec<Permission>),
}

fn path() -> impl Strategy<Value = String> {
    vec(prop_oneof!["a", "b"], 0..4).prop_map(|names| format!("/{}", names.join("/")))
}

fn permission() -> impl Strategy<Value = Permission> {
    let access = prop_oneof![
        Just(NodeAccess::None),
        Just(NodeAccess::Read),
        Just(NodeAccess::Write),
        Just(NodeAccess::Both)
    ];
    (access, 0..3_usize).prop_map(|(access, who)| Permission { access, domid: DOMAINS[who] })
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        path().prop_map(Op::Read),
        path().prop_map(Op::List),
        (path(), any::<u8>()).prop_map(|(path, value)| Op::Write(path, value)),
        path().prop_map(Op::Mkdir),
        path().prop_map(Op::Remove),
        (path(), vec(permission(), 1..4)).prop_map(|(path, perms)| Op::SetPerms(path, perms)),
    ]
}

fn caller(who: usize) -> Caller {
    Caller { domid: DOMAINS[who], target: None }
}

/// Does `op` on the server; an answer that can be compared.
fn run(server: &mut Server, who: usize, tx: u32, op: &Op) -> Result<Vec<u8>, Errno> {
    use xen_abi::xenstore::MessageKind as K;
    let (kind, payload) = match op {
        Op::Read(path) => (K::READ, format!("{path}\0")),
        Op::List(path) => (K::DIRECTORY, format!("{path}\0")),
        Op::Write(path, value) => (K::WRITE, format!("{path}\0{value}")),
        Op::Mkdir(path) => (K::MKDIR, format!("{path}\0")),
        Op::Remove(path) => (K::RM, format!("{path}\0")),
        Op::SetPerms(path, perms) => {
            let perms: String = perms.iter().map(|perm| format!("{perm}\0")).collect();
            (K::SET_PERMS, format!("{path}\0{perms}"))
        }
    };
    let request = Message { kind, req_id: 1, tx_id: tx, payload: payload.into_bytes() };
    server.execute(caller(who), &request, &mut ())
}

fn parent(path: &str) -> String {
    match path.rfind('/') {
        Some(0) | None => "/".into(),
        Some(at) => path[..at].into(),
    }
}

fn rights(who: usize, perms: &[Permission]) -> (bool, bool) {
    let me = DOMAINS[who];
    if who == 0 || perms[0].domid == me {
        return (true, true);
    }
    let entry = perms[1..].iter().find(|entry| entry.domid == me).unwrap_or(&perms[0]);
    (entry.access.reads(), entry.access.writes())
}

/// The node at `path`, if `who` has the right; by the nearest node above when there is none.
fn check(flat: &Flat, who: usize, path: &str, write: bool) -> Result<(), Errno> {
    let mut at = path.to_string();
    while !flat.contains_key(&at) {
        at = parent(&at);
    }
    let (may_read, may_write) = rights(who, &flat[&at].1);
    if !(if write { may_write } else { may_read }) {
        Err(Errno::EACCES)
    } else if at == path {
        Ok(())
    } else {
        Err(Errno::ENOENT)
    }
}

fn is_below(path: &str, above: &str) -> bool {
    path.strip_prefix(above.trim_end_matches('/')).is_some_and(|rest| rest.starts_with('/'))
}

/// Creates a node and its parents.
fn create(flat: &mut Flat, who: usize, path: &str, value: Vec<u8>) {
    let above = parent(path);
    if !flat.contains_key(&above) {
        create(flat, who, &above, Vec::new());
    }
    let mut perms = flat[&above].1.clone();
    if who != 0 {
        perms[0].domid = DOMAINS[who];
    }
    flat.insert(path.into(), (value, perms));
}

/// Does `op` on the model.
fn model(flat: &mut Flat, who: usize, op: &Op) -> Result<Vec<u8>, Errno> {
    match op {
        Op::Read(path) => check(flat, who, path, false).map(|()| flat[path].0.clone()),
        Op::List(path) => {
            check(flat, who, path, false)?;
            let names = flat.keys().filter(|name| *name != "/" && parent(name) == *path);
            Ok(names
                .flat_map(|name| {
                    format!("{}\0", &name[name.rfind('/').unwrap() + 1..]).into_bytes()
                })
                .collect())
        }
        Op::Write(path, value) => {
            let value = value.to_string().into_bytes();
            match check(flat, who, path, true) {
                Ok(()) => flat.get_mut(path).unwrap().0 = value,
                Err(Errno::ENOENT) => create(flat, who, path, value),
                Err(errno) => return Err(errno),
            }
            Ok(b"OK\0".to_vec())
        }
        Op::Mkdir(path) => {
            match check(flat, who, path, true) {
                Ok(()) => {}
                Err(Errno::ENOENT) => create(flat, who, path, Vec::new()),
                Err(errno) => return Err(errno),
            }
            Ok(b"OK\0".to_vec())
        }
        Op::Remove(path) => {
            if path == "/" {
                return Err(Errno::EINVAL);
            }
            match check(flat, who, path, true) {
                Err(Errno::ENOENT) if flat.contains_key(&parent(path)) => {}
                other => other?,
            }
            flat.retain(|name, _| name != path && !is_below(name, path));
            Ok(b"OK\0".to_vec())
        }
        Op::SetPerms(path, perms) => {
            check(flat, who, path, true)?;
            let owner = flat[path].1[0].domid;
            if who != 0 && owner != DOMAINS[who] {
                return Err(Errno::EACCES);
            }
            if who != 0 && perms[0].domid != owner {
                return Err(Errno::EPERM);
            }
            flat.get_mut(path).unwrap().1 = perms.clone();
            Ok(b"OK\0".to_vec())
        }
    }
}

/// A server and a model, both with a root that everybody may use.
fn both() -> (Server, Flat) {
    let mut server = Server::default();
    for domid in DOMAINS {
        server.connect(domid);
    }
    let perms = vec![Permission { access: NodeAccess::Both, domid: DomainId(0) }];
    run(&mut server, 0, 0, &Op::SetPerms("/".into(), perms.clone())).unwrap();
    (server, Flat::from([("/".into(), (Vec::new(), perms))]))
}

/// All nodes of the server.
fn flat(server: &Server) -> Flat {
    fn walk(path: &str, node: &tree::Node, flat: &mut Flat) {
        let key = if path.is_empty() { "/" } else { path };
        flat.insert(key.into(), (node.value.to_vec(), node.perms.to_vec()));
        for (name, child) in &node.children {
            walk(&format!("{path}/{name}"), child, flat);
        }
    }
    let mut all = Flat::new();
    let root = Path::parse("/", DomainId(0)).unwrap();
    walk("", server.tree.get(&root).unwrap(), &mut all);
    all
}

/// What a transaction did, and what it was answered.
type Log = Vec<(Op, Result<Vec<u8>, Errno>)>;

/// One step of several clients with transactions.
#[derive(Clone, Debug)]
enum Step {
    Start(usize),
    Do(usize, bool, Op),
    End(usize, bool),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        2 => (0..3_usize).prop_map(Step::Start),
        8 => (0..3_usize, any::<bool>(), op()).prop_map(|(who, tx, op)| Step::Do(who, tx, op)),
        2 => (0..3_usize, prop::bool::weighted(0.8)).prop_map(|(who, commit)| Step::End(who, commit)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(CASES))]

    /// Every answer and every node is the model's; in particular nobody reads what he may not.
    #[test]
    fn requests_do_what_the_model_does(ops in vec((0..3_usize, op()), 0..60)) {
        let (mut server, mut nodes) = both();
        for (who, op) in ops {
            prop_assert_eq!(run(&mut server, who, 0, &op), model(&mut nodes, who, &op), "{:?}", op);
            prop_assert_eq!(flat(&server), nodes.clone());
        }
        prop_assert!(server.tree.usage_is_right());
    }

    /// Every transaction sees the nodes as they were at its start, and its own changes. One that
    /// succeeds gives, at the moment it ends, the answers it gave before: as if it had run then.
    #[test]
    fn transactions_are_serialisable(steps in vec(step(), 0..80)) {
        let (mut server, mut nodes) = both();
        // Per client: number, private nodes, what was done and answered.
        let mut open: [Option<(u32, Flat, Log)>; 3] = [None, None, None];
        for step in steps {
            match step {
                Step::Start(who) if open[who].is_none() => {
                    let id = server.execute(caller(who), &Message {
                        kind: xen_abi::xenstore::MessageKind::TRANSACTION_START,
                        req_id: 1, tx_id: 0, payload: vec![0],
                    }, &mut ()).unwrap();
                    let id = String::from_utf8(id).unwrap().trim_end_matches('\0').parse().unwrap();
                    open[who] = Some((id, nodes.clone(), Vec::new()));
                }
                Step::Do(who, true, op) if open[who].is_some() => {
                    let (id, snapshot, log) = open[who].as_mut().unwrap();
                    let answer = run(&mut server, who, *id, &op);
                    prop_assert_eq!(&answer, &model(snapshot, who, &op), "{:?}", op);
                    log.push((op, answer));
                }
                Step::Do(who, _, op) => {
                    prop_assert_eq!(run(&mut server, who, 0, &op), model(&mut nodes, who, &op));
                }
                Step::End(who, commit) => {
                    let Some((id, _, log)) = open[who].take() else { continue };
                    match server.end(caller(who), id, commit) {
                        Ok(()) if commit => {
                            for (op, answer) in log {
                                prop_assert_eq!(&model(&mut nodes, who, &op), &answer, "{:?}", op);
                            }
                        }
                        Ok(()) => {}
                        Err(errno) => prop_assert_eq!(errno, Errno::EAGAIN),
                    }
                }
                Step::Start(_) => {}
            }
            prop_assert_eq!(flat(&server), nodes.clone());
        }
        prop_assert!(server.tree.usage_is_right());
    }

    /// A transaction that nobody disturbs always succeeds.
    #[test]
    fn a_lone_transaction_succeeds(before in vec(op(), 0..20), ops in vec(op(), 0..20)) {
        let (mut server, mut nodes) = both();
        for op in before {
            prop_assert_eq!(run(&mut server, 0, 0, &op), model(&mut nodes, 0, &op));
        }
        let transaction = crate::transaction::Transaction::start(&server.tree);
        let id = server.connection(DOMAINS[1]).unwrap().add_transaction(transaction);
        for op in &ops {
            prop_assert_eq!(run(&mut server, 1, id, op), model(&mut nodes, 1, op));
        }
        prop_assert_eq!(server.end(caller(1), id, true), Ok(()));
        prop_assert_eq!(flat(&server), nodes);
    }

    /// Whatever a guest asks for, it never owns or holds more than its quotas allow.
    #[test]
    fn quotas_hold(ops in vec((op(), any::<bool>(), 0..3_usize), 0..120)) {
        let quotas = Quotas { nodes: 5, node_bytes: 1000, ..Quotas::default() };
        let (mut server, _) = both();
        server.quotas = quotas;
        let transaction = crate::transaction::Transaction::start(&server.tree);
        let id = server.connection(DOMAINS[1]).unwrap().add_transaction(transaction);
        for (op, tx, who) in ops {
            if who == 0 && matches!(op, Op::Write(..) | Op::Mkdir(_) | Op::SetPerms(..)) {
                // What the control domain gives away is not limited.
                continue;
            }
            let _ = run(&mut server, who, if tx && who == 1 { id } else { 0 }, &op);
            if server.connections[&DOMAINS[1]].transactions.is_empty() {
                break;
            }
        }
        let _ = server.end(caller(1), id, true);
        for domid in [DOMAINS[1], DOMAINS[2]] {
            prop_assert!(server.tree.usage(domid).nodes <= quotas.nodes);
            prop_assert!(server.tree.usage(domid).bytes <= quotas.node_bytes);
        }
        prop_assert!(server.tree.usage_is_right());
    }
}
