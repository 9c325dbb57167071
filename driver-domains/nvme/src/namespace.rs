//! A namespace: one disk of the controller.

use crate::controller::{Blocks, Controller};
use crate::identify::Unusable;
use alloc::rc::Rc;
use core::cell::RefCell;
use domain_api::Registers;
use domain_api::disk::{
    Busy, Completion, Disk, DiskError, Geometry, Operation, Request, SECTOR, Tag,
};
use xen_abi::PAGE_SIZE;

/// A namespace of a running controller.
///
/// One that this driver cannot use keeps its place among the others: it has no sectors, and
/// refuses everything.
#[derive(Debug)]
pub struct Namespace<R> {
    pub(crate) controller: Rc<RefCell<Controller<R>>>,
    /// Its place among the disks.
    pub(crate) place: u8,
    pub(crate) id: u32,
    pub(crate) geometry: Geometry,
    pub(crate) unusable: Option<Unusable>,
}

/// Who does a request.
enum Way {
    /// The controller.
    Device(Blocks),
    /// Nobody: there is nothing to do.
    Nothing,
}

impl<R> Namespace<R> {
    /// Its id at the controller, from 1.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Why it cannot be used, if so.
    #[must_use]
    pub fn unusable(&self) -> Option<Unusable> {
        self.unusable
    }

    /// Checks a request.
    #[inline]
    fn check(&self, request: &Request<'_>) -> Result<Way, DiskError> {
        if self.unusable.is_some() {
            return Err(DiskError::Unsupported);
        }
        let most = match request.operation {
            Operation::Flush if !self.geometry.volatile_cache => return Ok(Way::Nothing),
            Operation::Flush => {
                return Ok(Way::Device(Blocks { namespace: self.id, first: 0, count: 0 }));
            }
            Operation::Read => self.geometry.max_sectors,
            _ if self.geometry.read_only => return Err(DiskError::ReadOnly),
            Operation::Write => self.geometry.max_sectors,
            Operation::Discard => self.geometry.max_discard_sectors,
            Operation::WriteZeroes => self.geometry.max_write_zeroes_sectors,
        };
        let blocks = self.blocks(request, most)?;
        let data = matches!(request.operation, Operation::Read | Operation::Write);
        if data && !self.fits(request) {
            return Err(DiskError::Unsupported);
        }
        Ok(Way::Device(blocks))
    }

    #[inline]
    fn blocks(&self, request: &Request<'_>, most: u32) -> Result<Blocks, DiskError> {
        let Request { sector, sectors, .. } = *request;
        let shift = self.geometry.sector_size.trailing_zeros() - SECTOR.trailing_zeros();
        let whole = (sector | sectors) & ((1 << shift) - 1) == 0;
        if !whole || sectors == 0 || sectors > u64::from(most) {
            return Err(DiskError::Unsupported);
        }
        match sector.checked_add(sectors) {
            Some(end) if end <= self.geometry.sectors => {}
            _ => return Err(DiskError::OutOfRange),
        }
        #[expect(clippy::cast_possible_truncation, reason = "at most `most`")]
        let count = (sectors >> shift) as u32;
        Ok(Blocks { namespace: self.id, first: sector >> shift, count })
    }

    /// Whether the buffers hold the request's sectors, and PRP entries can name them: all but
    /// the first start at their page's start, all but the last end at its end.
    #[inline]
    fn fits(&self, request: &Request<'_>) -> bool {
        let buffers = request.buffers;
        let last = buffers.len().wrapping_sub(1);
        let mut bytes = 0_u64;
        for (n, buffer) in buffers.iter().enumerate() {
            let (offset, len) = (usize::from(buffer.offset), usize::from(buffer.len));
            let end = offset + len;
            let whole = (n == 0 || offset == 0) && (n == last || end == PAGE_SIZE);
            let sectors = (offset | len) % 512 == 0 && len != 0;
            if !whole || !sectors || end > PAGE_SIZE {
                return false;
            }
            bytes += len as u64;
        }
        buffers.len() <= usize::from(self.geometry.max_buffers) && bytes == request.sectors * SECTOR
    }
}

impl<R: Registers> Namespace<R> {
    /// Ends a request without the controller.
    fn end(&self, tag: Tag, result: Result<(), DiskError>) -> Result<(), Busy> {
        self.controller.borrow_mut().end(self.place, Completion { tag, result })
    }
}

impl<R: Registers> Disk for Namespace<R> {
    fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    fn submit(&mut self, request: Request<'_>) -> Result<(), Busy> {
        match self.check(&request) {
            Ok(Way::Device(blocks)) => {
                self.controller.borrow_mut().submit(self.place, blocks, &request)
            }
            Ok(Way::Nothing) => self.end(request.tag, Ok(())),
            Err(error) => self.end(request.tag, Err(error)),
        }
    }

    fn kick(&mut self) {
        self.controller.borrow_mut().kick();
    }

    fn complete(&mut self) -> Option<Completion> {
        self.controller.borrow_mut().complete(self.place)
    }
}
