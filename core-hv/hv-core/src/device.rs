//! The device hypercall group: what the owner of a PCI function may ask.

use crate::event::Port;
use crate::fault::Answer;
use crate::p2m::Kind;
use crate::pci::Pci;
use crate::platform::{Bdf, Platform};
use crate::state::Core;
use axolotl_abi::device::{self, Bar, BindInterrupt, Config, DeviceInfo, Translate};
use xen_abi::event::STATUS_PIRQ;
use xen_abi::{DomainId, Errno, Gfn};

/// Most pages of one [`Translate`].
const TRANSLATE_MAX: u32 = 512;

impl<P: Platform> Core<P> {
    /// `device_op`.
    pub(crate) fn device_op(
        &mut self,
        p: &mut P,
        id: DomainId,
        [command, gpa, ..]: [u64; 5],
    ) -> Answer {
        match command {
            device::GET_DEVICE => self.get_device(p, id, gpa),
            device::CONFIG_READ => {
                let mut op: Config = self.get(p, id, gpa)?;
                let bdf = self.device_of(id, op.index)?;
                op.value = Pci::read(p, bdf, op.offset, op.width)?;
                self.put(p, id, gpa, &op)?;
                Ok(0)
            }
            device::CONFIG_WRITE => {
                let op: Config = self.get(p, id, gpa)?;
                let bdf = self.device_of(id, op.index)?;
                Pci::write(p, bdf, op.offset, op.width, op.value)?;
                Ok(0)
            }
            device::BIND_INTERRUPT => self.bind_interrupt(p, id, gpa),
            device::TRANSLATE => self.translate(p, id, gpa),
            _ => Err(Errno::ENOSYS.into()),
        }
    }

    fn device_of(&self, id: DomainId, index: u32) -> Result<Bdf, Errno> {
        self.me(id).devices.get(index as usize).copied().ok_or(Errno::ENODEV)
    }

    fn get_device(&mut self, p: &mut P, id: DomainId, gpa: u64) -> Answer {
        let mut op: DeviceInfo = self.get(p, id, gpa)?;
        let bdf = self.device_of(id, op.index)?;
        let function = self.pci.find(bdf).ok_or(Errno::ENODEV)?;
        op.bdf = bdf.0;
        op.vendor = function.vendor;
        op.device = function.device;
        op.class = function.class;
        op.msix_vectors = function.msix_vectors();
        op.msi_vectors = function.msi_vectors();
        op.dma_translated = 1;
        op.bars = [Bar::default(); 6];
        for (shown, (bar, &gpa)) in
            op.bars.iter_mut().zip(function.bars.iter().zip(&function.places))
        {
            if gpa != 0 {
                *shown = Bar { gpa, bytes: bar.bytes };
            }
        }
        self.put(p, id, gpa, &op)?;
        Ok(0)
    }

    fn bind_interrupt(&mut self, p: &mut P, id: DomainId, gpa: u64) -> Answer {
        let mut op: BindInterrupt = self.get(p, id, gpa)?;
        let bdf = self.device_of(id, op.index)?;
        op.port = self.new_port(p, id, Port::new(STATUS_PIRQ, DomainId(0), op.vector))?;
        let bound = self.pci.bind(p, bdf, op.vector, id, op.port);
        if let Err(errno) = bound.and_then(|()| self.put(p, id, gpa, &op)) {
            self.close(p, id, op.port);
            return Err(errno.into());
        }
        Ok(0)
    }

    fn translate(&mut self, p: &mut P, id: DomainId, gpa: u64) -> Answer {
        let op: Translate = self.get(p, id, gpa)?;
        self.device_of(id, op.index)?;
        if op.count > TRANSLATE_MAX {
            return Err(Errno::E2BIG.into());
        }
        for index in 0..u64::from(op.count) {
            let gfn = Gfn(op.gfn.wrapping_add(index));
            let page = self.me(id).p2m.page(p, gfn).ok_or(Errno::EFAULT)?;
            if page.kind != Kind::Ram && !page.dma {
                return Err(Errno::EFAULT.into());
            }
            let at = op.addresses.wrapping_add(8 * index);
            self.put(p, id, at, &page.mfn.address())?;
        }
        Ok(0)
    }
}
