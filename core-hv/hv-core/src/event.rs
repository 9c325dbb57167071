//! Event channels, two-level (`xen-abi.md` §9).
//!
//! A port is 8 bytes in the domain's port table:
//!
//! | bits   | meaning                                             |
//! |--------|-----------------------------------------------------|
//! | 0..8   | `STATUS_*`                                          |
//! | 8..16  | the vCPU that it notifies                           |
//! | 16..32 | remote domain, of an unbound or interdomain port    |
//! | 32..64 | remote port, virtual interrupt, or device vector    |
//!
//! An interdomain port and its peer always name each other; only this module writes entries, so
//! that stays true. Pending and mask bits are in the shared-info page, which the domain writes
//! too: they are changed by atomic operations only, and nothing else depends on them.

use crate::domain::MAX_DOMAINS;
use crate::fault::Answer;
use crate::platform::Platform;
use crate::state::Core;
use crate::vcpu::{VcpuId, Wait};
use axolotl_abi::control::Rights;
use xen_abi::event::{self, AllocUnbound, BindInterdomain, BindIpi, BindVcpu, BindVirq, PortOp};
use xen_abi::event::{
    STATUS_CLOSED, STATUS_INTERDOMAIN, STATUS_IPI, STATUS_PIRQ, STATUS_UNBOUND, STATUS_VIRQ, Status,
};
use xen_abi::shared_info::{EVTCHN_MASK, EVTCHN_PENDING, VCPU_PENDING_SEL, VCPU_UPCALL_PENDING};
use xen_abi::{DomainId, Errno, EventPort};

/// Ports of a domain, port 0 included.
pub const PORT_LIMIT: u32 = 1024;
const ENTRY_BYTES: usize = 8;

/// What a port is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Port {
    /// `STATUS_*`.
    pub status: u32,
    /// Remote domain.
    pub remote: DomainId,
    /// Remote port, virtual interrupt, or device vector.
    pub detail: u32,
    /// The vCPU that it notifies.
    pub vcpu: u8,
}

impl Port {
    const FREE: Self = Self::new(STATUS_CLOSED, DomainId(0), 0);

    pub(crate) const fn new(status: u32, remote: DomainId, detail: u32) -> Self {
        Self { status, remote, detail, vcpu: 0 }
    }

    #[expect(clippy::cast_possible_truncation, reason = "takes fields apart")]
    const fn decode(raw: u64) -> Self {
        Self {
            status: raw as u32 & 0xff,
            remote: DomainId((raw >> 16) as u16),
            detail: (raw >> 32) as u32,
            vcpu: (raw >> 8) as u8,
        }
    }

    const fn encode(self) -> u64 {
        self.status as u64
            | (self.vcpu as u64) << 8
            | (self.remote.0 as u64) << 16
            | (self.detail as u64) << 32
    }
}

/// Virtual interrupts that every vCPU has its own of.
const fn is_per_vcpu(virq: u32) -> bool {
    matches!(virq, event::VIRQ_TIMER | event::VIRQ_DEBUG)
}

impl<P: Platform> Core<P> {
    /// `event_channel_op`.
    pub(crate) fn event_op(&mut self, p: &mut P, id: DomainId, args: [u64; 5]) -> Answer {
        let gpa = args[1];
        match args[0] {
            event::SEND => {
                let op: PortOp = self.get(p, id, gpa)?;
                self.send(p, id, op.port)
            }
            event::UNMASK => {
                let op: PortOp = self.get(p, id, gpa)?;
                self.unmask(p, id, op.port)
            }
            event::ALLOC_UNBOUND => self.alloc_unbound(p, id, gpa),
            event::BIND_INTERDOMAIN => self.bind_interdomain(p, id, gpa),
            event::BIND_VIRQ => self.bind_virq(p, id, gpa),
            event::BIND_IPI => self.bind_ipi(p, id, gpa),
            event::BIND_VCPU => self.bind_vcpu(p, id, gpa),
            event::CLOSE => {
                let op: PortOp = self.get(p, id, gpa)?;
                if self.port(p, id, op.port).status == STATUS_CLOSED {
                    return Err(Errno::EINVAL.into());
                }
                self.close(p, id, op.port);
                Ok(0)
            }
            event::STATUS => self.port_status(p, id, gpa),
            event::RESET => self.reset_ports(p, id, gpa),
            event::BIND_PIRQ => Err(Errno::EINVAL.into()),
            _ => Err(Errno::ENOSYS.into()),
        }
    }

    /// What a port is; any number may be asked for.
    #[must_use]
    pub fn port(&self, p: &P, id: DomainId, port: EventPort) -> Port {
        self.domain(id)
            .and_then(|domain| domain.ports.table.entry(port.0, ENTRY_BYTES))
            .map_or(Port::FREE, |(frame, at)| Port::decode(p.load64(frame, at)))
    }

    fn set_port(&mut self, p: &mut P, id: DomainId, port: EventPort, value: Port) {
        if let Some((frame, at)) = self.me(id).ports.table.entry(port.0, ENTRY_BYTES) {
            p.store64(frame, at, value.encode());
        }
    }

    /// Finds a free port of `id` and makes it `value`.
    ///
    /// # Errors
    /// `ENOSPC`: none is free. `ENOMEM`: the domain cannot pay for more table.
    pub(crate) fn new_port(
        &mut self,
        p: &mut P,
        id: DomainId,
        value: Port,
    ) -> Result<EventPort, Errno> {
        for number in self.me(id).ports.hint.max(1)..PORT_LIMIT {
            let port = EventPort(number);
            if self.me(id).ports.table.entry(number, ENTRY_BYTES).is_none() {
                let (domain, frames) = self.with_frames(id);
                domain.ports.table.grow(p, frames, &mut domain.account)?;
            }
            if self.port(p, id, port).status == STATUS_CLOSED {
                self.clear_pending(p, id, port);
                self.set_port(p, id, port, value);
                let ports = &mut self.me_mut(id).ports;
                ports.hint = number + 1;
                ports.used += 1;
                return Ok(port);
            }
        }
        Err(Errno::ENOSPC)
    }

    /// An event of an earlier life of the port is none of this one.
    fn clear_pending(&self, p: &mut P, id: DomainId, port: EventPort) {
        let (word, bit) = place(port);
        p.and64(self.me(id).shared, EVTCHN_PENDING + word, !bit);
    }

    fn alloc_unbound(&mut self, p: &mut P, id: DomainId, gpa: u64) -> Answer {
        let mut op: AllocUnbound = self.get(p, id, gpa)?;
        let owner = self.self_or_built(id, op.dom)?;
        let remote = if op.remote_dom == DomainId::SELF { id } else { op.remote_dom };
        op.port = self.new_port(p, owner, Port::new(STATUS_UNBOUND, remote, 0))?;
        if let Err(errno) = self.put(p, id, gpa, &op) {
            self.close(p, owner, op.port);
            return Err(errno.into());
        }
        Ok(0)
    }

    fn bind_interdomain(&mut self, p: &mut P, id: DomainId, gpa: u64) -> Answer {
        let mut op: BindInterdomain = self.get(p, id, gpa)?;
        let remote = if op.remote_dom == DomainId::SELF { id } else { op.remote_dom };
        if !self.domain(remote).ok_or(Errno::ESRCH)?.is_alive() {
            return Err(Errno::ESRCH.into());
        }
        let theirs = self.port(p, remote, op.remote_port);
        if theirs.status != STATUS_UNBOUND || theirs.remote != id {
            return Err(Errno::EINVAL.into());
        }
        let local = Port::new(STATUS_INTERDOMAIN, remote, op.remote_port.0);
        op.local_port = self.new_port(p, id, local)?;
        self.set_port(
            p,
            remote,
            op.remote_port,
            Port { vcpu: theirs.vcpu, ..Port::new(STATUS_INTERDOMAIN, id, op.local_port.0) },
        );
        if let Err(errno) = self.put(p, id, gpa, &op) {
            self.close(p, id, op.local_port);
            return Err(errno.into());
        }
        // The peer may have sent before we bound: look once (§9.2). Never on the peer's port:
        // a frontend may not expect an event yet (§0, 9).
        self.raise(p, id, op.local_port);
        Ok(0)
    }

    fn bind_virq(&mut self, p: &mut P, id: DomainId, gpa: u64) -> Answer {
        let mut op: BindVirq = self.get(p, id, gpa)?;
        if op.virq >= event::NR_VIRQS {
            return Err(Errno::EINVAL.into());
        }
        let index = op.virq as usize;
        if !is_per_vcpu(op.virq) && op.vcpu != 0 {
            return Err(Errno::EINVAL.into());
        }
        let v = self.vcpu_named(id, op.vcpu)?;
        if self.virq_port(v, op.virq) != 0 {
            return Err(Errno::EEXIST.into());
        }
        let port = Port { vcpu: v.index, ..Port::new(STATUS_VIRQ, DomainId(0), op.virq) };
        op.port = self.new_port(p, id, port)?;
        let number = u16::try_from(op.port.0).unwrap_or(0);
        if is_per_vcpu(op.virq) {
            self.vcpu_mut(v).virqs[index] = number;
        } else {
            self.me_mut(id).ports.virqs[index] = number;
            if self.me(id).rights.contains(right_for(op.virq)) {
                self.global_virqs[index].get_or_insert(id);
            }
        }
        if op.virq == event::VIRQ_CONSOLE && self.global_virqs[index] == Some(id) {
            p.serial_interrupt(true);
        }
        if let Err(errno) = self.put(p, id, gpa, &op) {
            self.close(p, id, op.port);
            return Err(errno.into());
        }
        Ok(0)
    }

    fn bind_ipi(&mut self, p: &mut P, id: DomainId, gpa: u64) -> Answer {
        let mut op: BindIpi = self.get(p, id, gpa)?;
        let v = self.vcpu_named(id, op.vcpu)?;
        let port = Port { vcpu: v.index, ..Port::new(STATUS_IPI, DomainId(0), 0) };
        op.port = self.new_port(p, id, port)?;
        if let Err(errno) = self.put(p, id, gpa, &op) {
            self.close(p, id, op.port);
            return Err(errno.into());
        }
        Ok(0)
    }

    fn bind_vcpu(&mut self, p: &mut P, id: DomainId, gpa: u64) -> Answer {
        let op: BindVcpu = self.get(p, id, gpa)?;
        let v = self.vcpu_named(id, op.vcpu)?;
        let port = self.port(p, id, op.port);
        match port.status {
            STATUS_UNBOUND | STATUS_INTERDOMAIN | STATUS_PIRQ => {}
            STATUS_VIRQ if !is_per_vcpu(port.detail) => {}
            _ => return Err(Errno::EINVAL.into()),
        }
        self.set_port(p, id, op.port, Port { vcpu: v.index, ..port });
        Ok(0)
    }

    /// A vCPU of the caller, by a number that may be any.
    pub(crate) fn vcpu_named(&self, id: DomainId, vcpu: u32) -> Result<VcpuId, Errno> {
        let index = u8::try_from(vcpu).map_err(|_| Errno::ENOENT)?;
        let exists = usize::from(index) < self.me(id).vcpus.len();
        exists.then_some(VcpuId { domain: id, index }).ok_or(Errno::ENOENT)
    }

    fn send(&mut self, p: &mut P, id: DomainId, port: EventPort) -> Answer {
        let entry = self.port(p, id, port);
        match entry.status {
            STATUS_INTERDOMAIN => self.raise(p, entry.remote, EventPort(entry.detail)),
            STATUS_IPI => self.raise(p, id, port),
            // The peer is away; it looks when it binds again.
            STATUS_UNBOUND => {}
            _ => return Err(Errno::EINVAL.into()),
        }
        Ok(0)
    }

    fn unmask(&mut self, p: &mut P, id: DomainId, port: EventPort) -> Answer {
        if self.port(p, id, port).status == STATUS_CLOSED {
            return Err(Errno::EINVAL.into());
        }
        let shared = self.me(id).shared;
        let (word, bit) = place(port);
        let was_masked = p.and64(shared, EVTCHN_MASK + word, !bit) & bit != 0;
        if was_masked && p.load64(shared, EVTCHN_PENDING + word) & bit != 0 {
            self.select(p, id, port);
        }
        Ok(0)
    }

    fn port_status(&mut self, p: &mut P, id: DomainId, gpa: u64) -> Answer {
        let mut op: Status = self.get(p, id, gpa)?;
        let owner = self.self_or_built(id, op.dom)?;
        if op.port.0 >= PORT_LIMIT {
            return Err(Errno::EINVAL.into());
        }
        let port = self.port(p, owner, op.port);
        op.status = port.status;
        op.vcpu = port.vcpu.into();
        op.remote_port = EventPort(0);
        op.detail = match port.status {
            STATUS_UNBOUND => port.remote.0.into(),
            STATUS_INTERDOMAIN => {
                op.remote_port = EventPort(port.detail);
                port.remote.0.into()
            }
            _ => port.detail,
        };
        self.put(p, id, gpa, &op)?;
        Ok(0)
    }

    fn reset_ports(&mut self, p: &mut P, id: DomainId, gpa: u64) -> Answer {
        let dom: DomainId = self.get(p, id, gpa)?;
        let owner = self.self_or_built(id, dom)?;
        self.close_all(p, owner);
        Ok(0)
    }

    /// Closes all ports of a domain.
    pub(crate) fn close_all(&mut self, p: &mut P, id: DomainId) {
        for number in 1..PORT_LIMIT {
            if self.me(id).ports.used == 0 {
                break;
            }
            self.close(p, id, EventPort(number));
        }
    }

    /// Nobody can bind any more to the ports that wait for a domain that was destroyed: the next
    /// one with its id is another domain.
    pub(crate) fn forget_remote(&mut self, p: &mut P, gone: DomainId) {
        for index in 0..MAX_DOMAINS {
            let id = DomainId(u16::try_from(index).unwrap_or(0));
            let Some(domain) = self.domain(id).filter(|domain| domain.ports.used > 0) else {
                continue;
            };
            let end = domain.ports.table.len() * (4096 / ENTRY_BYTES);
            for number in 1..PORT_LIMIT.min(u32::try_from(end).unwrap_or(PORT_LIMIT)) {
                let port = self.port(p, id, EventPort(number));
                if port.status == STATUS_UNBOUND && port.remote == gone {
                    let nobody = Port::new(STATUS_UNBOUND, DomainId::INVALID, 0);
                    self.set_port(p, id, EventPort(number), nobody);
                }
            }
        }
    }

    /// Closes a port if it is open. The peer's becomes unbound for this domain, so that the next
    /// incarnation finds it where it was (§10, R10).
    pub(crate) fn close(&mut self, p: &mut P, id: DomainId, port: EventPort) {
        let entry = self.port(p, id, port);
        match entry.status {
            STATUS_CLOSED => return,
            STATUS_INTERDOMAIN => {
                let peer = EventPort(entry.detail);
                let vcpu = self.port(p, entry.remote, peer).vcpu;
                let unbound = Port { vcpu, ..Port::new(STATUS_UNBOUND, id, 0) };
                self.set_port(p, entry.remote, peer, unbound);
            }
            STATUS_VIRQ if is_per_vcpu(entry.detail) => {
                let v = VcpuId { domain: id, index: entry.vcpu };
                self.vcpu_mut(v).virqs[entry.detail as usize] = 0;
            }
            STATUS_VIRQ => self.unbind_virq(p, id, entry.detail),
            STATUS_PIRQ => self.pci.unbind(p, id, port),
            _ => {}
        }
        self.set_port(p, id, port, Port::FREE);
        self.clear_pending(p, id, port);
        let ports = &mut self.me_mut(id).ports;
        ports.used -= 1;
        ports.hint = ports.hint.min(port.0);
    }

    fn unbind_virq(&mut self, p: &mut P, id: DomainId, virq: u32) {
        let index = virq as usize;
        self.me_mut(id).ports.virqs[index] = 0;
        if self.global_virqs[index] == Some(id) {
            self.global_virqs[index] = None;
            if virq == event::VIRQ_CONSOLE {
                p.serial_interrupt(false);
            }
        }
    }

    /// Raises a virtual interrupt that a vCPU has its own of, if it is bound.
    pub(crate) fn raise_own_virq(&mut self, p: &mut P, v: VcpuId, virq: u32) {
        let port = self.virq_port(v, virq);
        if port != 0 {
            self.raise(p, v.domain, EventPort(port.into()));
        }
    }

    fn virq_port(&self, v: VcpuId, virq: u32) -> u16 {
        if is_per_vcpu(virq) {
            self.vcpu(v).virqs[virq as usize]
        } else {
            self.me(v.domain).ports.virqs[virq as usize]
        }
    }

    /// Raises a global virtual interrupt at the domain that has the right to it and bound it.
    pub(crate) fn raise_global(&mut self, p: &mut P, virq: u32) {
        if let Some(id) = self.global_virqs[virq as usize] {
            self.raise_own_virq(p, VcpuId::first(id), virq);
        }
    }

    /// Makes a port pending (§9.3).
    pub(crate) fn raise(&mut self, p: &mut P, id: DomainId, port: EventPort) {
        let Some(domain) = self.domain(id) else { return };
        let shared = domain.shared;
        let (word, bit) = place(port);
        if p.or64(shared, EVTCHN_PENDING + word, bit) & bit != 0 {
            return;
        }
        if p.load64(shared, EVTCHN_MASK + word) & bit == 0 {
            self.select(p, id, port);
        }
        for v in self.vcpus_of(id) {
            let wait = self.vcpu(v).wait;
            if matches!(wait, Wait::Port(polled) if polled == 0 || polled == port.0) {
                self.wake(p, v);
            }
        }
    }

    /// Tells the port's vCPU to look at the word of a port that is pending and not masked.
    fn select(&mut self, p: &mut P, id: DomainId, port: EventPort) {
        let index = match self.me(id).vcpus.len() {
            1 => 0,
            _ => self.port(p, id, port).vcpu,
        };
        let v = VcpuId { domain: id, index };
        let (info, at) = self.vcpu(v).info;
        let bit = 1 << (port.0 / 64);
        if p.or64(info, at + VCPU_PENDING_SEL, bit) & bit == 0 {
            p.store8(info, at + VCPU_UPCALL_PENDING, 1);
            self.notify(p, v);
        }
    }

    /// Whether an event takes a vCPU away from what it waits for: a kernel that has interrupts off
    /// would only ask again.
    pub(crate) fn is_interrupted(&self, p: &P, v: VcpuId) -> bool {
        let is_deaf = self.me(v.domain).pvh.is_some() && !self.vcpu(v).virt.interrupts;
        !is_deaf && self.has_upcall(p, v)
    }

    /// Whether a vCPU would be told of an event now.
    pub(crate) fn has_upcall(&self, p: &P, v: VcpuId) -> bool {
        let (info, at) = self.vcpu(v).info;
        p.load8(info, at + VCPU_UPCALL_PENDING) != 0
    }

    /// The caller itself, or a domain that it created.
    pub(crate) fn self_or_built(&self, id: DomainId, which: DomainId) -> Result<DomainId, Errno> {
        if which == DomainId::SELF || which == id {
            return Ok(id);
        }
        let domain = self.domain(which).ok_or(Errno::ESRCH)?;
        if domain.builder != Some(id) {
            return Err(Errno::EPERM);
        }
        if !domain.is_alive() {
            return Err(Errno::ESRCH);
        }
        Ok(which)
    }
}

/// The right that a global virtual interrupt needs to be raised at its binder.
const fn right_for(virq: u32) -> Rights {
    match virq {
        event::VIRQ_CONSOLE | event::VIRQ_CON_RING => Rights::CONSOLE,
        _ => Rights::BUILD,
    }
}

/// Byte offset of a port's word in a bitmap, and its bit.
fn place(port: EventPort) -> (usize, u64) {
    ((port.0 / 64) as usize * 8, 1 << (port.0 % 64))
}
