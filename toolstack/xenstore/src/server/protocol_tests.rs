//! The request table of `xen-abi.md` §6.2, row by row, on the wire.
#![expect(clippy::octal_escapes, reason = "NULs before digits, as on the wire")]

use super::*;
use xen_abi::xenstore::MessageKind as K;
use xenbus::wire::{Decoder, Message, encode};

const D0: DomainId = DomainId(0);
const GUEST: DomainId = DomainId(5);
const OTHER: DomainId = DomainId(6);

/// A host that refuses one domain and notes the rest.
#[derive(Default)]
struct Noted(Vec<String>);

impl Host for Noted {
    fn introduce(&mut self, domid: DomainId, gfn: Gfn, port: EventPort) -> Result<(), Errno> {
        if domid.0 == 13 {
            return Err(Errno::EINVAL);
        }
        self.0.push(format!("introduce {} {} {}", domid.0, gfn.0, port.0));
        Ok(())
    }

    fn release(&mut self, domid: DomainId) {
        self.0.push(format!("release {}", domid.0));
    }
}

struct Rig {
    server: Server,
    host: Noted,
    decoders: BTreeMap<DomainId, Decoder>,
    /// Events that came along with replies.
    seen: BTreeMap<DomainId, Vec<Message>>,
}

impl Rig {
    /// With the homes of two guests, each owned by its guest.
    fn new() -> Self {
        let mut rig = Self {
            server: Server::default(),
            host: Noted::default(),
            decoders: BTreeMap::new(),
            seen: BTreeMap::new(),
        };
        for domid in [D0, GUEST, OTHER] {
            rig.server.connect(domid);
        }
        for domid in [5, 6] {
            let home = format!("/local/domain/{domid}");
            rig.ok(D0, K::MKDIR, &format!("{home}\0"));
            rig.ok(D0, K::SET_PERMS, &format!("{home}\0n{domid}\0"));
        }
        rig
    }

    fn messages(&mut self, domid: DomainId) -> Vec<Message> {
        let mut out = vec![0; 16 << 10];
        let len = self.server.output(domid, &mut out);
        let decoder = self.decoders.entry(domid).or_default();
        let mut input = &out[..len];
        std::iter::from_fn(|| decoder.feed(&mut input).unwrap()).collect()
    }

    fn send(&mut self, domid: DomainId, tx_id: u32, kind: K, payload: &[u8]) -> Vec<Message> {
        let mut bytes = Vec::new();
        encode(&mut bytes, kind, 77, tx_id, &[payload]).unwrap();
        assert_eq!(self.server.input(domid, &bytes, &mut self.host), Ok(bytes.len()));
        self.messages(domid)
    }

    /// The reply to one request; events that came along are kept.
    fn ask(
        &mut self,
        domid: DomainId,
        tx_id: u32,
        kind: K,
        payload: &str,
    ) -> Result<String, String> {
        let messages = self.send(domid, tx_id, kind, payload.as_bytes()).into_iter();
        let (events, mut replies): (Vec<_>, Vec<_>) =
            messages.partition(|message| message.kind == K::WATCH_EVENT);
        self.seen.entry(domid).or_default().extend(events);
        let reply = replies.pop().expect("every request is answered");
        assert!(replies.is_empty());
        assert_eq!((reply.req_id, reply.tx_id), (77, tx_id));
        let text = String::from_utf8(reply.payload).unwrap();
        if reply.kind == K::ERROR {
            Err(text.strip_suffix('\0').unwrap().into())
        } else {
            assert_eq!(reply.kind, kind);
            Ok(text)
        }
    }

    fn ok(&mut self, domid: DomainId, kind: K, payload: &str) {
        assert_eq!(self.ask(domid, 0, kind, payload).as_deref(), Ok("OK\0"), "{payload:?}");
    }

    fn fails(&mut self, domid: DomainId, kind: K, payload: &str, errno: &str) {
        let answer = self.ask(domid, 0, kind, payload);
        assert_eq!(answer.as_ref().map_err(String::as_str), Err(errno), "{kind:?} {payload:?}");
    }

    fn gives(&mut self, domid: DomainId, kind: K, payload: &str, reply: &str) {
        assert_eq!(self.ask(domid, 0, kind, payload).as_deref(), Ok(reply), "{kind:?} {payload:?}");
    }

    fn start(&mut self, domid: DomainId) -> u32 {
        let id = self.ask(domid, 0, K::TRANSACTION_START, "\0").unwrap();
        id.strip_suffix('\0').unwrap().parse().unwrap()
    }

    /// The events that wait for a domain, as `path token`.
    fn events(&mut self, domid: DomainId) -> Vec<String> {
        let mut events = self.seen.remove(&domid).unwrap_or_default();
        events.extend(self.messages(domid));
        events
            .into_iter()
            .map(|event| {
                assert_eq!((event.kind, event.req_id, event.tx_id), (K::WATCH_EVENT, 0, 0));
                let text = String::from_utf8(event.payload).unwrap();
                text.strip_suffix('\0').unwrap().replace('\0', " ")
            })
            .collect()
    }
}

/// Row 0.
#[test]
fn control_is_not_implemented() {
    let mut rig = Rig::new();
    rig.fails(D0, K::CONTROL, "print\0", "ENOSYS");
    rig.fails(GUEST, K::CONTROL, "print\0", "EACCES");
}

/// Row 1.
#[test]
fn directory_lists_children() {
    let mut rig = Rig::new();
    rig.gives(GUEST, K::DIRECTORY, "/local/domain/5\0", "");
    rig.ok(GUEST, K::WRITE, "b\0");
    rig.ok(GUEST, K::WRITE, "a/x\0");
    rig.gives(GUEST, K::DIRECTORY, "/local/domain/5\0", "a\0b\0");
    rig.gives(D0, K::DIRECTORY, "/\0", "local\0");
    rig.fails(GUEST, K::DIRECTORY, "c\0", "ENOENT");
    rig.fails(GUEST, K::DIRECTORY, "/local\0", "EACCES");
    rig.fails(GUEST, K::DIRECTORY, "a", "EINVAL");
    rig.fails(GUEST, K::DIRECTORY, "a\0b\0", "EINVAL");
    for n in 0..100 {
        rig.ok(GUEST, K::MKDIR, &format!("{}{n}\0", "long".repeat(10)));
    }
    rig.fails(GUEST, K::DIRECTORY, "/local/domain/5\0", "E2BIG");
}

/// Row 2.
#[test]
fn read_returns_the_value_without_nul() {
    let mut rig = Rig::new();
    rig.ok(GUEST, K::WRITE, "a\0value");
    rig.gives(GUEST, K::READ, "a\0", "value");
    rig.gives(GUEST, K::READ, "/local/domain/5/a\0", "value");
    rig.gives(D0, K::READ, "/local/domain/5/a\0", "value");
    rig.fails(GUEST, K::READ, "b\0", "ENOENT");
    rig.fails(OTHER, K::READ, "/local/domain/5/a\0", "EACCES");
    for path in ["", "\0", "//a\0", "/a/\0", "a b\0", "@x\0", "\u{e9}\0"] {
        rig.fails(GUEST, K::READ, path, "EINVAL");
    }
}

/// Rows 3 and 14.
#[test]
fn permissions_are_set_by_the_owner_and_read_by_readers() {
    let mut rig = Rig::new();
    rig.ok(GUEST, K::WRITE, "a\0");
    rig.gives(GUEST, K::GET_PERMS, "a\0", "n5\0");
    rig.ok(GUEST, K::SET_PERMS, "a\0n5\0r6\0");
    rig.gives(OTHER, K::GET_PERMS, "/local/domain/5/a\0", "n5\0r6\0");
    rig.fails(GUEST, K::SET_PERMS, "a\0n6\0", "EPERM");
    rig.ok(GUEST, K::SET_PERMS, "a\0n5\0b6\0");
    rig.fails(OTHER, K::SET_PERMS, "/local/domain/5/a\0n5\0", "EACCES");
    rig.ok(D0, K::SET_PERMS, "/local/domain/5/a\0r6\0");
    rig.gives(GUEST, K::GET_PERMS, "a\0", "r6\0");
    rig.fails(GUEST, K::SET_PERMS, "a\0n5\0", "EACCES");
    rig.fails(GUEST, K::GET_PERMS, "none\0", "ENOENT");
    for bad in ["a\0", "a\0x5\0", "a\0n\0", "a\0n5", "a\0n99999\0"] {
        rig.fails(D0, K::SET_PERMS, bad, "EINVAL");
    }
}

/// Row 4.
#[test]
fn watch_fires_once_at_once_and_echoes_path_and_token() {
    let mut rig = Rig::new();
    rig.ok(GUEST, K::WATCH, "device\0ffff8880 %s\0");
    assert_eq!(rig.events(GUEST), ["device ffff8880 %s"]);
    let messages = rig.send(GUEST, 0, K::WATCH, b"/x/y\0t\0");
    assert_eq!(messages[0].kind, K::WATCH);
    assert_eq!(messages[1].payload, b"/x/y\0t\0");
    rig.fails(GUEST, K::WATCH, "device\0ffff8880 %s\0", "EEXIST");
    rig.ok(GUEST, K::WATCH, "device\0other\0");
    for bad in ["a\0", "a\0t", "a\0t\0u\0", "//\0t\0", "@nothing\0t\0"] {
        rig.fails(GUEST, K::WATCH, bad, "EINVAL");
    }
    rig.fails(GUEST, K::WATCH, &format!("a\0{}\0", "t".repeat(1023)), "EINVAL");
    for special in ["@introduceDomain\0t\0", "@releaseDomain\0t\0"] {
        rig.fails(GUEST, K::WATCH, special, "EACCES");
        rig.ok(D0, K::WATCH, special);
    }
}

/// Row 5.
#[test]
fn unwatch_ends_events() {
    let mut rig = Rig::new();
    rig.ok(GUEST, K::WATCH, "a\0t\0");
    rig.events(GUEST);
    rig.fails(GUEST, K::UNWATCH, "a\0u\0", "ENOENT");
    // An absolute path is another watch than the relative one for the same node.
    rig.fails(GUEST, K::UNWATCH, "/local/domain/5/a\0t\0", "ENOENT");
    for name in ["a", "a/b", "a/c"] {
        rig.ok(D0, K::WRITE, &format!("/local/domain/5/{name}\0"));
    }
    rig.ok(GUEST, K::UNWATCH, "a\0t\0");
    rig.ok(GUEST, K::WRITE, "a\0");
    // One was on its way before the request was taken; the others are gone with the watch.
    assert_eq!(rig.events(GUEST), ["a t"]);
    rig.fails(GUEST, K::UNWATCH, "a\0t\0", "ENOENT");
}

/// Rows 6 and 7.
#[test]
fn transactions_start_and_end() {
    let mut rig = Rig::new();
    let id = rig.start(GUEST);
    assert_ne!(id, 0);
    assert_eq!(rig.ask(GUEST, id, K::TRANSACTION_START, "\0"), Err("EBUSY".into()));
    assert_eq!(rig.ask(GUEST, id, K::WRITE, "a\01").as_deref(), Ok("OK\0"));
    assert_eq!(rig.ask(GUEST, id, K::READ, "a\0").as_deref(), Ok("1"));
    rig.fails(GUEST, K::READ, "a\0", "ENOENT");
    assert_eq!(rig.ask(OTHER, id, K::READ, "a\0"), Err("ENOENT".into()), "not its own");
    assert_eq!(rig.ask(GUEST, id, K::TRANSACTION_END, "X\0"), Err("EINVAL".into()));
    assert_eq!(rig.ask(GUEST, id, K::TRANSACTION_END, "T\0").as_deref(), Ok("OK\0"));
    rig.gives(GUEST, K::READ, "a\0", "1");
    assert_eq!(rig.ask(GUEST, id, K::TRANSACTION_END, "T\0"), Err("ENOENT".into()));
    rig.fails(GUEST, K::TRANSACTION_END, "T\0", "ENOENT");
    let id = rig.start(GUEST);
    assert_eq!(rig.ask(GUEST, id, K::RM, "a\0").as_deref(), Ok("OK\0"));
    assert_eq!(rig.ask(GUEST, id, K::TRANSACTION_END, "F\0").as_deref(), Ok("OK\0"));
    rig.gives(GUEST, K::READ, "a\0", "1");
}

/// Row 7: the second of two transactions that wrote what both have read.
#[test]
fn a_conflict_is_eagain_and_changes_nothing() {
    let mut rig = Rig::new();
    rig.ok(GUEST, K::WRITE, "a\00");
    let (one, two) = (rig.start(GUEST), rig.start(GUEST));
    for (id, write) in [(one, "a\01"), (two, "a\02")] {
        assert_eq!(rig.ask(GUEST, id, K::READ, "a\0").as_deref(), Ok("0"));
        assert_eq!(rig.ask(GUEST, id, K::WRITE, write).as_deref(), Ok("OK\0"));
        assert_eq!(rig.ask(GUEST, id, K::WRITE, "b\0").as_deref(), Ok("OK\0"));
    }
    assert_eq!(rig.ask(GUEST, two, K::TRANSACTION_END, "T\0").as_deref(), Ok("OK\0"));
    assert_eq!(rig.ask(GUEST, one, K::READ, "a\0").as_deref(), Ok("1"), "still its own world");
    assert_eq!(rig.ask(GUEST, one, K::TRANSACTION_END, "T\0"), Err("EAGAIN".into()));
    rig.gives(GUEST, K::READ, "a\0", "2");
}

/// Row 7: what nobody looked at does not matter.
#[test]
fn transactions_in_different_places_do_not_disturb_each_other() {
    let mut rig = Rig::new();
    let (one, two) = (rig.start(GUEST), rig.start(GUEST));
    assert_eq!(rig.ask(GUEST, one, K::WRITE, "dir/a\0").as_deref(), Ok("OK\0"));
    rig.ok(GUEST, K::WRITE, "c\0");
    assert_eq!(rig.ask(GUEST, two, K::WRITE, "other/b\0").as_deref(), Ok("OK\0"));
    for id in [one, two] {
        assert_eq!(rig.ask(GUEST, id, K::TRANSACTION_END, "T\0").as_deref(), Ok("OK\0"));
    }
    rig.gives(GUEST, K::DIRECTORY, "/local/domain/5\0", "c\0dir\0other\0");
    // A listing, however, is what a new name changes.
    let three = rig.start(GUEST);
    assert!(rig.ask(GUEST, three, K::DIRECTORY, "dir\0").is_ok());
    rig.ok(GUEST, K::WRITE, "dir/new\0");
    assert_eq!(rig.ask(GUEST, three, K::TRANSACTION_END, "T\0"), Err("EAGAIN".into()));
}

/// Row 7: nothing is removed unseen.
#[test]
fn a_removal_is_in_conflict_with_every_change_below() {
    let mut rig = Rig::new();
    for meanwhile in ["a/b/new\01", "a/b\02", "a\03"] {
        rig.ok(GUEST, K::WRITE, "a/b\01");
        let id = rig.start(GUEST);
        assert_eq!(rig.ask(GUEST, id, K::RM, "a\0").as_deref(), Ok("OK\0"));
        rig.ok(GUEST, K::WRITE, meanwhile);
        assert_eq!(rig.ask(GUEST, id, K::TRANSACTION_END, "T\0"), Err("EAGAIN".into()));
        let id = rig.start(GUEST);
        assert_eq!(rig.ask(GUEST, id, K::RM, "a\0").as_deref(), Ok("OK\0"));
        rig.ok(GUEST, K::WRITE, "beside\0");
        assert_eq!(rig.ask(GUEST, id, K::TRANSACTION_END, "T\0").as_deref(), Ok("OK\0"));
    }
}

/// Rows 8, 9, 17, 18 and 19, for guests.
#[test]
fn toolstack_requests_are_not_for_guests() {
    let mut rig = Rig::new();
    for (kind, payload) in [
        (K::INTRODUCE, "7\01\02\0"),
        (K::RELEASE, "6\0"),
        (K::IS_DOMAIN_INTRODUCED, "6\0"),
        (K::RESUME, "6\0"),
        (K::SET_TARGET, "5\06\0"),
    ] {
        rig.fails(GUEST, kind, payload, "EACCES");
    }
    assert!(rig.host.0.is_empty());
    assert!(rig.server.connections.contains_key(&OTHER));
}

/// Row 8.
#[test]
fn introduce_connects_a_domain_or_its_next_incarnation() {
    let mut rig = Rig::new();
    rig.ok(D0, K::WATCH, "@introduceDomain\0t\0");
    rig.events(D0);
    rig.ok(D0, K::INTRODUCE, "7\0123\04\0");
    assert_eq!(rig.host.0, ["introduce 7 123 4"]);
    assert_eq!(rig.events(D0), ["@introduceDomain t"]);
    rig.ok(GUEST, K::WATCH, "a\0t\0");
    rig.events(GUEST);
    let id = rig.start(GUEST);
    rig.server.input(GUEST, b"half", &mut ()).unwrap();
    rig.ok(D0, K::INTRODUCE, "5\00\09\0");
    rig.ok(D0, K::WRITE, "/local/domain/5/a\0");
    assert!(rig.events(GUEST).is_empty());
    assert_eq!(rig.ask(GUEST, id, K::TRANSACTION_END, "T\0"), Err("ENOENT".into()));
    // The host failed: the domain is not connected, whatever it was.
    rig.server.connect(DomainId(13));
    rig.fails(D0, K::INTRODUCE, "13\00\09\0", "EINVAL");
    rig.gives(D0, K::IS_DOMAIN_INTRODUCED, "13\0", "F\0");
    for bad in ["7\01\0", "7\01\00\0", "0\01\02\0", "x\01\02\0", "7\0-1\02\0", "40000\01\02\0"] {
        rig.fails(D0, K::INTRODUCE, bad, "EINVAL");
    }
}

/// Row 9.
#[test]
fn release_disconnects_and_leaves_the_nodes() {
    let mut rig = Rig::new();
    rig.ok(GUEST, K::WRITE, "a\01");
    rig.ok(D0, K::WATCH, "@releaseDomain\0t\0");
    rig.events(D0);
    rig.ok(D0, K::RELEASE, "5\0");
    assert_eq!(rig.host.0, ["release 5"]);
    assert_eq!(rig.events(D0), ["@releaseDomain t"]);
    assert_eq!(rig.server.input(GUEST, b"x", &mut ()), Err(Refused));
    rig.gives(D0, K::READ, "/local/domain/5/a\0", "1");
    rig.fails(D0, K::RELEASE, "5\0", "ENOENT");
    rig.fails(D0, K::RELEASE, "0\0", "EINVAL");
}

/// Row 17.
#[test]
fn is_domain_introduced_answers_t_or_f() {
    let mut rig = Rig::new();
    rig.gives(D0, K::IS_DOMAIN_INTRODUCED, "5\0", "T\0");
    rig.gives(D0, K::IS_DOMAIN_INTRODUCED, "7\0", "F\0");
    rig.fails(D0, K::IS_DOMAIN_INTRODUCED, "\0", "EINVAL");
}

/// Row 18.
#[test]
fn resume_needs_a_connected_domain() {
    let mut rig = Rig::new();
    rig.ok(D0, K::RESUME, "5\0");
    rig.fails(D0, K::RESUME, "7\0", "ENOENT");
}

/// Row 19.
#[test]
fn set_target_lends_rights() {
    let mut rig = Rig::new();
    rig.ok(GUEST, K::WRITE, "a\01");
    rig.fails(OTHER, K::READ, "/local/domain/5/a\0", "EACCES");
    rig.ok(D0, K::SET_TARGET, "6\05\0");
    rig.gives(OTHER, K::READ, "/local/domain/5/a\0", "1");
    rig.fails(D0, K::SET_TARGET, "6\07\0", "ENOENT");
    rig.fails(D0, K::SET_TARGET, "6\00\0", "EINVAL");
    rig.ok(D0, K::RELEASE, "5\0");
    rig.fails(OTHER, K::READ, "/local/domain/5/a\0", "EACCES");
}

/// Row 10.
#[test]
fn get_domain_path_is_for_everyone() {
    let mut rig = Rig::new();
    rig.gives(GUEST, K::GET_DOMAIN_PATH, "6\0", "/local/domain/6\0");
    rig.gives(GUEST, K::GET_DOMAIN_PATH, "999\0", "/local/domain/999\0");
    rig.fails(GUEST, K::GET_DOMAIN_PATH, "self\0", "EINVAL");
}

/// Row 11.
#[test]
fn write_creates_parents_and_inherits_permissions() {
    let mut rig = Rig::new();
    rig.ok(D0, K::MKDIR, "/shared\0");
    rig.ok(D0, K::SET_PERMS, "/shared\0n0\0b5\0r6\0");
    rig.ok(GUEST, K::WRITE, "/shared/a/b\0v");
    // Owner is the creator, the rest is inherited.
    rig.gives(GUEST, K::GET_PERMS, "/shared/a\0", "n5\0b5\0r6\0");
    rig.gives(OTHER, K::READ, "/shared/a/b\0", "v");
    rig.fails(OTHER, K::WRITE, "/shared/a/b\0w", "EACCES");
    rig.fails(OTHER, K::WRITE, "/shared/c\0w", "EACCES");
    // The toolstack's nodes keep the parent's owner.
    rig.ok(D0, K::WRITE, "/local/domain/5/d\0");
    rig.gives(D0, K::GET_PERMS, "/local/domain/5/d\0", "n5\0");
    rig.ok(GUEST, K::WRITE, "a\0");
    rig.gives(GUEST, K::READ, "a\0", "");
    rig.fails(GUEST, K::WRITE, "a", "EINVAL");
    rig.ok(GUEST, K::WRITE, &format!("a\0{}", "v".repeat(2048)));
    rig.fails(GUEST, K::WRITE, &format!("a\0{}", "v".repeat(2049)), "ENOSPC");
}

/// Row 12.
#[test]
fn mkdir_of_an_existing_node_is_ok_and_changes_nothing() {
    let mut rig = Rig::new();
    rig.ok(GUEST, K::WRITE, "a\01");
    rig.ok(GUEST, K::WATCH, "a\0t\0");
    rig.events(GUEST);
    rig.ok(GUEST, K::MKDIR, "a\0");
    assert!(rig.events(GUEST).is_empty());
    rig.gives(GUEST, K::READ, "a\0", "1");
    rig.ok(GUEST, K::MKDIR, "a/b/c\0");
    assert_eq!(rig.events(GUEST), ["a/b/c t"]);
    rig.fails(GUEST, K::MKDIR, "/local/x\0", "EACCES");
}

/// Row 13.
#[test]
fn rm_removes_the_subtree_and_forgives_what_is_not_there() {
    let mut rig = Rig::new();
    rig.ok(GUEST, K::WRITE, "a/b/c\0");
    rig.ok(GUEST, K::RM, "a\0");
    rig.fails(GUEST, K::READ, "a/b/c\0", "ENOENT");
    rig.ok(GUEST, K::RM, "a\0");
    rig.fails(GUEST, K::RM, "a/b\0", "ENOENT");
    rig.fails(GUEST, K::RM, "/local/domain/6\0", "EACCES");
    rig.fails(D0, K::RM, "/\0", "EINVAL");
}

/// Rows 15, 16, 20 and above 22.
#[test]
fn other_numbers_are_not_implemented() {
    let mut rig = Rig::new();
    for kind in [15, 16, 20, 23, 24, u32::MAX] {
        rig.fails(GUEST, K(kind), "\0", "ENOSYS");
        rig.fails(D0, K(kind), "\0", "ENOSYS");
    }
}

/// Row 21.
#[test]
fn reset_watches_drops_watches_and_transactions() {
    let mut rig = Rig::new();
    rig.ok(GUEST, K::WATCH, "a\0t\0");
    rig.events(GUEST);
    let id = rig.start(GUEST);
    rig.ok(GUEST, K::RESET_WATCHES, "\0");
    rig.ok(GUEST, K::WRITE, "a\0");
    assert!(rig.events(GUEST).is_empty());
    assert_eq!(rig.ask(GUEST, id, K::TRANSACTION_END, "F\0"), Err("ENOENT".into()));
}

/// Row 22; the real client reads long lists in `local::tests`.
#[test]
fn directory_part_names_a_generation_and_marks_the_end() {
    let mut rig = Rig::new();
    rig.ok(GUEST, K::WRITE, "d/one\0");
    rig.ok(GUEST, K::WRITE, "d/two\0");
    let whole = rig.ask(GUEST, 0, K::DIRECTORY_PART, "d\00\0").unwrap();
    let (generation, names) = whole.split_once('\0').unwrap();
    assert_eq!(names, "one\0two\0\0");
    rig.gives(GUEST, K::DIRECTORY_PART, "d\04\0", &format!("{generation}\0two\0\0"));
    rig.gives(GUEST, K::DIRECTORY_PART, "d\08\0", &format!("{generation}\0\0"));
    for offset in ["1", "9", "x", "4294967295"] {
        rig.fails(GUEST, K::DIRECTORY_PART, &format!("d\0{offset}\0"), "EINVAL");
    }
    rig.ok(GUEST, K::WRITE, "d/one\0changed");
    rig.gives(GUEST, K::DIRECTORY_PART, "d\00\0", &whole);
    rig.ok(GUEST, K::RM, "d/one\0");
    assert_ne!(rig.ask(GUEST, 0, K::DIRECTORY_PART, "d\00\0").unwrap(), "two\0\0");
    rig.fails(GUEST, K::DIRECTORY_PART, "d\0", "EINVAL");
}

/// §6.2, watches: on the node itself and below, also for an unchanged value, relative as set.
#[test]
fn events_come_for_every_change_at_or_below() {
    let mut rig = Rig::new();
    rig.ok(GUEST, K::WRITE, "a\01");
    rig.ok(GUEST, K::WATCH, "a\0rel\0");
    rig.ok(D0, K::WATCH, "/local/domain/5/a\0abs\0");
    rig.events(GUEST);
    rig.events(D0);
    rig.ok(D0, K::WRITE, "/local/domain/5/a\01");
    assert_eq!(rig.events(GUEST), ["a rel"]);
    rig.events(D0);
    rig.ok(GUEST, K::WRITE, "a/b/c\0");
    rig.ok(GUEST, K::SET_PERMS, "a/b\0r5\0");
    rig.ok(GUEST, K::RM, "a/b/c\0");
    let expected = ["/b/c", "/b"].map(|path| format!("/local/domain/5/a{path} abs"));
    // Equal events that nobody has taken yet are one.
    assert_eq!(rig.events(D0), expected);
    rig.ok(GUEST, K::WRITE, "ab\0");
    assert!(rig.events(D0).is_empty());
}

/// §6.2, watches: with an ancestor goes the watched node; the event has the watched path.
#[test]
fn removing_an_ancestor_is_an_event_for_the_watched_path() {
    let mut rig = Rig::new();
    rig.ok(GUEST, K::WRITE, "a/b/c\0");
    for path in ["a/b", "a/b/none", "a"] {
        rig.ok(GUEST, K::WATCH, &format!("{path}\0t\0"));
    }
    rig.events(GUEST);
    rig.ok(D0, K::RM, "/local/domain/5/a\0");
    assert_eq!(rig.events(GUEST), ["a/b t", "a t"]);
}

/// §6.2, watches: only for nodes that the domain may read; a removed right is the last event.
#[test]
fn events_come_only_for_what_may_be_read() {
    let mut rig = Rig::new();
    rig.ok(GUEST, K::WRITE, "a\0");
    rig.ok(OTHER, K::WATCH, "/local/domain/5\0t\0");
    rig.events(OTHER);
    rig.ok(GUEST, K::WRITE, "a\01");
    rig.ok(GUEST, K::WRITE, "b/c\01");
    rig.ok(GUEST, K::RM, "b\0");
    assert!(rig.events(OTHER).is_empty());
    let event = ["/local/domain/5/a t"];
    rig.ok(GUEST, K::SET_PERMS, "a\0n5\0r6\0");
    assert_eq!(rig.events(OTHER), event);
    rig.ok(GUEST, K::WRITE, "a\02");
    assert_eq!(rig.events(OTHER), event);
    rig.ok(GUEST, K::SET_PERMS, "a\0n5\0");
    assert_eq!(rig.events(OTHER), event);
    rig.ok(GUEST, K::WRITE, "a\03");
    assert!(rig.events(OTHER).is_empty());
}

/// §6.2: events of a transaction come when it ends, and only if it succeeds.
#[test]
fn events_of_a_transaction_come_at_its_end() {
    let mut rig = Rig::new();
    rig.ok(D0, K::WATCH, "/local/domain/5\0t\0");
    rig.events(D0);
    let id = rig.start(GUEST);
    for write in ["a\01", "b\01", "a\02"] {
        assert!(rig.ask(GUEST, id, K::WRITE, write).is_ok());
    }
    assert!(rig.events(D0).is_empty());
    assert!(rig.ask(GUEST, id, K::TRANSACTION_END, "T\0").is_ok());
    assert_eq!(rig.events(D0), ["/local/domain/5/a t", "/local/domain/5/b t"]);
    let id = rig.start(GUEST);
    assert!(rig.ask(GUEST, id, K::WRITE, "a\03").is_ok());
    assert!(rig.ask(GUEST, id, K::TRANSACTION_END, "F\0").is_ok());
    assert!(rig.events(D0).is_empty());
}

/// Nobody learns whether a node exists where he may not look.
#[test]
fn absence_is_a_secret_too() {
    let mut rig = Rig::new();
    rig.ok(GUEST, K::WRITE, "there\0");
    for kind in [K::READ, K::DIRECTORY, K::GET_PERMS, K::MKDIR, K::RM] {
        for name in ["there", "absent", "absent/below"] {
            rig.fails(OTHER, kind, &format!("/local/domain/5/{name}\0"), "EACCES");
        }
    }
}

/// The limits of [`Quotas`], each met exactly.
#[test]
fn quotas_are_met_exactly() {
    let mut rig = Rig::new();
    for n in 1..1000 {
        rig.ok(GUEST, K::MKDIR, &format!("n{n}\0"));
    }
    rig.fails(GUEST, K::MKDIR, "more\0", "ENOSPC");
    rig.ok(GUEST, K::RM, "n1\0");
    rig.fails(GUEST, K::MKDIR, "two/levels\0", "ENOSPC");
    rig.ok(GUEST, K::MKDIR, "more\0");
    rig.ok(OTHER, K::MKDIR, "mine\0");
    for n in 0..128 {
        rig.ok(GUEST, K::WATCH, &format!("x\0{n}\0"));
    }
    rig.fails(GUEST, K::WATCH, "x\0more\0", "E2BIG");
    for _ in 0..10 {
        rig.start(GUEST);
    }
    rig.fails(GUEST, K::TRANSACTION_START, "\0", "ENOSPC");
    rig.fails(GUEST, K::SET_PERMS, &format!("more\0{}", "n5\0".repeat(9)), "ENOSPC");
    // The control domain has no limits, but what it makes counts for the owner.
    rig.ok(D0, K::MKDIR, "/local/domain/5/by-d0\0");
    rig.ok(GUEST, K::RM, "n2\0");
    rig.fails(GUEST, K::MKDIR, "again\0", "ENOSPC");
}

/// Values count by bytes too.
#[test]
fn the_bytes_of_a_domain_are_limited() {
    let mut rig = Rig::new();
    let value = "v".repeat(2000);
    let mut written = 0;
    while rig.ask(GUEST, 0, K::WRITE, &format!("n{written}\0{value}")).is_ok() {
        written += 1;
    }
    assert!((100..140).contains(&written), "{written}");
    rig.fails(GUEST, K::MKDIR, &format!("{}\0", "x".repeat(2000)), "ENOSPC");
    rig.ok(GUEST, K::WRITE, "n0\0");
    rig.ok(GUEST, K::WRITE, &format!("again\0{}", &value[..1500]));
}

/// A transaction cannot hold more than its quota, nor keep others' old nodes for ever.
#[test]
fn transactions_are_bounded() {
    let mut rig = Rig::new();
    let id = rig.start(GUEST);
    let mut made = 0;
    let value = "v".repeat(500);
    while rig.ask(GUEST, id, K::WRITE, &format!("t/{made}\0{value}")).is_ok() {
        made += 1;
    }
    assert!((100..1000).contains(&made), "{made}");
    // All of a domain's transactions count, and nobody else's.
    let (another, other) = (rig.start(GUEST), rig.start(OTHER));
    assert_eq!(rig.ask(GUEST, another, K::WRITE, "x\0"), Err("ENOSPC".into()));
    assert_eq!(rig.ask(OTHER, other, K::WRITE, "x\0").as_deref(), Ok("OK\0"));
    assert_eq!(rig.ask(GUEST, another, K::TRANSACTION_END, "T\0").as_deref(), Ok("OK\0"));
    assert_eq!(rig.ask(GUEST, id, K::TRANSACTION_END, "T\0").as_deref(), Ok("OK\0"));

    let id = rig.start(GUEST);
    assert!(rig.ask(GUEST, id, K::READ, "/local/domain/5\0").is_ok());
    for n in 0..400 {
        rig.ok(D0, K::WRITE, &format!("/big/{n}\0{}", "v".repeat(2000)));
    }
    let other = rig.start(OTHER);
    for n in 0..400 {
        rig.ok(D0, K::WRITE, &format!("/big/{n}\0{}", "w".repeat(2000)));
    }
    for (domid, id) in [(GUEST, id), (OTHER, other)] {
        assert_eq!(rig.ask(domid, id, K::READ, "x\0"), Err("EAGAIN".into()));
        assert_eq!(rig.ask(domid, id, K::TRANSACTION_END, "T\0"), Err("EAGAIN".into()));
    }
}

/// §6.1: a length beyond 4096 leaves no way to find the next message.
#[test]
fn an_oversized_message_ends_the_connection_until_it_is_made_anew() {
    let mut rig = Rig::new();
    let mut bytes = Vec::new();
    encode(&mut bytes, K::READ, 1, 0, &[b"x\0"]).unwrap();
    bytes[12..16].copy_from_slice(&4097_u32.to_le_bytes());
    assert_eq!(rig.server.input(GUEST, &bytes, &mut ()), Err(Refused));
    assert_eq!(rig.server.input(GUEST, b"x", &mut ()), Err(Refused));
    assert_eq!(rig.server.wanted(GUEST), 0);
    rig.server.connect(GUEST);
    rig.ok(GUEST, K::WRITE, "a\0");
}

/// Events that a domain does not take are bounded, and none is lost without a trace.
#[test]
fn events_that_nobody_takes_are_merged() {
    let mut rig = Rig::new();
    rig.ok(GUEST, K::WATCH, "d\0t\0");
    rig.events(GUEST);
    let limit = rig.server.quotas.event_bytes;
    for n in 0..5000 {
        rig.ok(D0, K::WRITE, &format!("/local/domain/5/d/{n}\0"));
        assert!(rig.server.connections[&GUEST].buffered() <= limit + 100);
    }
    let events: Vec<String> =
        std::iter::from_fn(|| Some(rig.events(GUEST)).filter(|e| !e.is_empty()))
            .flatten()
            .collect();
    assert!(events.len() < 1000);
    assert_eq!(events[0], "d/0 t");
    assert_eq!(events.last().unwrap(), "d t");
}
