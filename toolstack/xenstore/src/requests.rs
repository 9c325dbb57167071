//! The requests: arguments from a payload, the answer's payload.
//!
//! Source: `docs/misc/xenstore.txt`.

use crate::change::{Change, find};
use crate::path::Path;
use crate::perms::{Caller, PRIVILEGED};
use crate::server::{Host, Server};
use crate::transaction::{Look, Transaction};
use crate::tree::Tree;
use crate::watch::{Special, Watch};
use alloc::format;
use alloc::string::ToString;
use alloc::vec::Vec;
use xen_abi::xenstore::{ABS_PATH_MAX, MessageKind, PAYLOAD_MAX};
use xen_abi::{DomainId, Errno, EventPort, Gfn};
use xenbus::wire::{Message, parse_decimal, parse_domid, strings};
use xenbus::{NodeAccess, Permission};

/// Longest token of a watch: with the longest path and their NULs, an event is never too long.
const TOKEN_MAX: usize = PAYLOAD_MAX - ABS_PATH_MAX - 2;

type Answer = Result<Vec<u8>, Errno>;

impl Server {
    /// Does what `request` asks, and returns the payload of the reply.
    pub(crate) fn execute(
        &mut self,
        caller: Caller,
        request: &Message,
        host: &mut dyn Host,
    ) -> Answer {
        match request.kind {
            MessageKind::DIRECTORY => self.directory(caller, request),
            MessageKind::DIRECTORY_PART => self.directory_part(caller, request),
            MessageKind::READ => self.read(caller, request),
            MessageKind::GET_PERMS => self.get_perms(caller, request),
            MessageKind::WRITE | MessageKind::MKDIR | MessageKind::RM | MessageKind::SET_PERMS => {
                let change = parse_change(caller, request)?;
                ok(self.change(caller, request.tx_id, change))
            }
            MessageKind::WATCH => ok(self.watch(caller, request)),
            MessageKind::UNWATCH => ok(self.unwatch(caller, request)),
            MessageKind::RESET_WATCHES => {
                self.connection(caller.domid)?.reset();
                ok(Ok(()))
            }
            MessageKind::TRANSACTION_START => self.start(caller, request),
            MessageKind::TRANSACTION_END => {
                let commit = match &request.payload[..] {
                    b"T\0" => true,
                    b"F\0" => false,
                    _ => return Err(Errno::EINVAL),
                };
                ok(self.end(caller, request.tx_id, commit))
            }
            MessageKind::GET_DOMAIN_PATH => {
                let [domid] = arguments(request)?;
                Ok(with_nul(&crate::path::home(domain(domid)?)))
            }
            _ => self.execute_privileged(caller, request, host),
        }
    }

    fn execute_privileged(
        &mut self,
        caller: Caller,
        request: &Message,
        host: &mut dyn Host,
    ) -> Answer {
        let known = matches!(
            request.kind,
            MessageKind::CONTROL
                | MessageKind::INTRODUCE
                | MessageKind::RELEASE
                | MessageKind::IS_DOMAIN_INTRODUCED
                | MessageKind::RESUME
                | MessageKind::SET_TARGET
        );
        if known && !caller.is_privileged() {
            return Err(Errno::EACCES);
        }
        match request.kind {
            MessageKind::INTRODUCE => ok(self.introduce(caller, request, host)),
            MessageKind::RELEASE => ok(self.release(request, host)),
            MessageKind::IS_DOMAIN_INTRODUCED => {
                let [domid] = arguments(request)?;
                let known = self.connections.contains_key(&domain(domid)?);
                Ok(with_nul(if known { "T" } else { "F" }))
            }
            MessageKind::RESUME => {
                let [domid] = arguments(request)?;
                // The store keeps nothing about a domain's shutdown that would have to be undone.
                ok(self.connection(domain(domid)?).map(drop))
            }
            MessageKind::SET_TARGET => ok(self.set_target(request)),
            _ => Err(Errno::ENOSYS),
        }
    }

    fn directory(&mut self, caller: Caller, request: &Message) -> Answer {
        let path = one_path(caller, request)?;
        let tree = self.look(caller, request.tx_id, &path, Look::Children)?;
        let (names, _) = children(tree, caller, &path)?;
        if names.len() > PAYLOAD_MAX { Err(Errno::E2BIG) } else { Ok(names) }
    }

    /// The list of children from a byte offset on, after the list's generation: as many whole
    /// names as fit, and an empty one behind the last.
    fn directory_part(&mut self, caller: Caller, request: &Message) -> Answer {
        let [path, offset] = arguments(request)?;
        let path = Path::parse(path, caller.domid)?;
        let offset = parse_decimal(offset).ok_or(Errno::EINVAL)? as usize;
        let tree = self.look(caller, request.tx_id, &path, Look::Children)?;
        let (names, generation) = children(tree, caller, &path)?;
        let starts_name =
            offset == 0 || offset.checked_sub(1).and_then(|at| names.get(at)) == Some(&0);
        if !starts_name {
            return Err(Errno::EINVAL);
        }
        let mut reply = with_nul(&generation.to_string());
        let rest = &names[offset..];
        let room = PAYLOAD_MAX - reply.len() - 1;
        if rest.len() <= room {
            reply.extend_from_slice(rest);
            reply.push(0);
        } else {
            let end = rest[..room].iter().rposition(|&byte| byte == 0).map_or(0, |at| at + 1);
            reply.extend_from_slice(&rest[..end]);
        }
        Ok(reply)
    }

    fn read(&mut self, caller: Caller, request: &Message) -> Answer {
        let path = one_path(caller, request)?;
        let tree = self.look(caller, request.tx_id, &path, Look::Content)?;
        Ok(find(tree, caller, &path, NodeAccess::Read)?.value.to_vec())
    }

    fn get_perms(&mut self, caller: Caller, request: &Message) -> Answer {
        let path = one_path(caller, request)?;
        let tree = self.look(caller, request.tx_id, &path, Look::Content)?;
        let node = find(tree, caller, &path, NodeAccess::Read)?;
        Ok(node.perms.iter().flat_map(|entry| with_nul(&entry.to_string())).collect())
    }

    fn watch(&mut self, caller: Caller, request: &Message) -> Result<(), Errno> {
        let watch = parse_watch(caller, request)?;
        let quotas = self.quotas;
        self.connection(caller.domid)?.watch(watch, &quotas, !caller.is_privileged())
    }

    fn unwatch(&mut self, caller: Caller, request: &Message) -> Result<(), Errno> {
        let watch = parse_watch(caller, request)?;
        self.connection(caller.domid)?.unwatch(&watch)
    }

    fn start(&mut self, caller: Caller, request: &Message) -> Answer {
        if request.tx_id != 0 {
            return Err(Errno::EBUSY);
        }
        let limit = self.quotas.transactions;
        let transaction = Transaction::start(&self.tree);
        let connection = self.connection(caller.domid)?;
        if !caller.is_privileged() && connection.transactions.len() >= limit {
            return Err(Errno::ENOSPC);
        }
        Ok(with_nul(&connection.add_transaction(transaction).to_string()))
    }

    fn introduce(
        &mut self,
        caller: Caller,
        request: &Message,
        host: &mut dyn Host,
    ) -> Result<(), Errno> {
        let [domid, gfn, port] = arguments(request)?;
        let domid = domain(domid)?;
        let gfn = Gfn(gfn.parse().map_err(|_| Errno::EINVAL)?);
        let port = EventPort(parse_decimal(port).filter(|&port| port != 0).ok_or(Errno::EINVAL)?);
        if domid == caller.domid {
            return Err(Errno::EINVAL);
        }
        self.disconnect(domid);
        host.introduce(domid, gfn, port)?;
        self.connect(domid);
        self.fire(Special::Introduce);
        Ok(())
    }

    fn release(&mut self, request: &Message, host: &mut dyn Host) -> Result<(), Errno> {
        let [domid] = arguments(request)?;
        let domid = domain(domid)?;
        if domid == PRIVILEGED {
            return Err(Errno::EINVAL);
        }
        self.connection(domid)?;
        host.release(domid);
        self.disconnect(domid);
        self.fire(Special::Release);
        Ok(())
    }

    fn set_target(&mut self, request: &Message) -> Result<(), Errno> {
        let [domid, target] = arguments(request)?;
        let (domid, target) = (domain(domid)?, domain(target)?);
        if target == PRIVILEGED {
            return Err(Errno::EINVAL);
        }
        self.connection(target)?;
        self.connection(domid)?.target = Some(target);
        Ok(())
    }
}

fn ok(result: Result<(), Errno>) -> Answer {
    result.map(|()| b"OK\0".to_vec())
}

fn with_nul(text: &str) -> Vec<u8> {
    format!("{text}\0").into_bytes()
}

/// Exactly `N` strings, each with its NUL.
fn arguments<const N: usize>(request: &Message) -> Result<[&str; N], Errno> {
    strings(&request.payload).and_then(|list| list.try_into().ok()).ok_or(Errno::EINVAL)
}

fn domain(text: &str) -> Result<DomainId, Errno> {
    parse_domid(text).ok_or(Errno::EINVAL)
}

fn one_path(caller: Caller, request: &Message) -> Result<Path, Errno> {
    let [path] = arguments(request)?;
    Path::parse(path, caller.domid)
}

fn parse_watch(caller: Caller, request: &Message) -> Result<Watch, Errno> {
    let [path, token] = arguments(request)?;
    if token.len() > TOKEN_MAX {
        return Err(Errno::EINVAL);
    }
    Watch::parse(path, token, caller)
}

fn parse_change(caller: Caller, request: &Message) -> Result<Change, Errno> {
    match request.kind {
        MessageKind::WRITE => {
            let end = request.payload.iter().position(|&byte| byte == 0).ok_or(Errno::EINVAL)?;
            let path = core::str::from_utf8(&request.payload[..end]).map_err(|_| Errno::EINVAL)?;
            let path = Path::parse(path, caller.domid)?;
            Ok(Change::Write { path, value: request.payload[end + 1..].to_vec() })
        }
        MessageKind::MKDIR => Ok(Change::Mkdir { path: one_path(caller, request)? }),
        MessageKind::RM => Ok(Change::Remove { path: one_path(caller, request)? }),
        _ => {
            let list = strings(&request.payload).ok_or(Errno::EINVAL)?;
            let (path, perms) = list.split_first().ok_or(Errno::EINVAL)?;
            let perms: Option<Vec<Permission>> =
                perms.iter().map(|text| Permission::parse(text)).collect();
            let perms = perms.filter(|perms| !perms.is_empty()).ok_or(Errno::EINVAL)?;
            Ok(Change::SetPerms { path: Path::parse(path, caller.domid)?, perms })
        }
    }
}

/// The names of the children with their NULs, and their generation.
fn children(tree: &Tree, caller: Caller, path: &Path) -> Result<(Vec<u8>, u64), Errno> {
    let node = find(tree, caller, path, NodeAccess::Read)?;
    let names = node.children.keys().flat_map(|name| name.bytes().chain([0])).collect();
    Ok((names, node.children_generation))
}
