//! A frontend behind the interface that drivers have, for code that shall run over either.

use super::{Blkfront, Buffer, Env, Error, IoError, Operation as FrontOperation, Part};
use alloc::collections::VecDeque;
use alloc::vec::Vec;
use domain_api::DmaPage;
use domain_api::disk::{
    Busy, Completion, Disk, DiskError, Geometry, Operation, Request, SECTOR, Tag,
};
use xen_abi::PAGE_SIZE;

/// A connected disk as a [`Disk`].
///
/// Requests may name only pages from [`Self::pages`]; a page may be in one request at a time.
pub struct FrontDisk<E> {
    front: Blkfront,
    env: E,
    geometry: Geometry,
    pages: Vec<DmaPage>,
    buffers: Vec<Option<Buffer>>,
    /// Lists of parts that no request uses.
    spare: Vec<Vec<Part>>,
    failed: VecDeque<Completion>,
}

impl<E: Env> FrontDisk<E> {
    /// Takes a connected frontend, and all of its buffers that are not lent.
    pub fn new(mut front: Blkfront, env: E) -> Self {
        let (mut pages, mut buffers) = (Vec::new(), Vec::new());
        while let Some(buffer) = front.take_buffer() {
            // An address that says which buffer it is; no device ever sees it.
            let bus_address = (buffers.len() * PAGE_SIZE) as u64;
            pages.push(DmaPage { page: buffer.page().clone(), bus_address });
            buffers.push(Some(buffer));
        }
        let info = *front.info();
        let max_sectors = u32::from(info.max_parts) * u32::from(super::SECTORS_PER_PAGE);
        let geometry = Geometry {
            sectors: info.sectors,
            sector_size: info.sector_size,
            physical_sector_size: info.physical_sector_size,
            read_only: info.read_only,
            volatile_cache: info.flush,
            max_discard_sectors: if info.discard { u32::MAX } else { 0 },
            max_write_zeroes_sectors: 0,
            max_sectors,
            max_buffers: info.max_parts,
            whole_pages: false,
            queue_depth: u16::try_from(info.slots).unwrap_or(u16::MAX),
        };
        let (spare, failed) = (Vec::new(), VecDeque::new());
        Self { front, env, geometry, pages, buffers, spare, failed }
    }

    /// The pages that requests can be made of.
    #[must_use]
    pub fn pages(&self) -> &[DmaPage] {
        &self.pages
    }

    /// The frontend.
    pub const fn front(&mut self) -> &mut Blkfront {
        &mut self.front
    }

    /// The frontend, with all its buffers. Requests that have not ended are given up: to be
    /// called when the connection has ended.
    pub fn into_front(mut self) -> Blkfront {
        while self.complete().is_some() {}
        for buffer in self.buffers.into_iter().flatten() {
            self.front.give_back(buffer);
        }
        self.front
    }

    /// Takes the buffers of a request; `None` when one is not ours or is in use.
    fn parts(&mut self, request: &Request<'_>) -> Option<Vec<Part>> {
        let mut parts = self.spare.pop().unwrap_or_default();
        for wanted in request.buffers {
            let index = usize::try_from(wanted.page.bus_address / PAGE_SIZE as u64).ok();
            let slot = index.and_then(|index| self.buffers.get_mut(index));
            let whole = u64::from(wanted.offset | wanted.len) % SECTOR == 0;
            let sectors = |bytes: u16| u8::try_from(u64::from(bytes) / SECTOR).ok();
            let (Some(slot), true, Some(first), Some(sectors)) =
                (slot, whole, sectors(wanted.offset), sectors(wanted.len))
            else {
                self.put(parts);
                return None;
            };
            let Some(buffer) = slot.take() else {
                self.put(parts);
                return None;
            };
            parts.push(Part { buffer, first, sectors });
        }
        Some(parts)
    }

    fn put(&mut self, mut parts: Vec<Part>) {
        for part in parts.drain(..) {
            let index = usize::from(part.buffer.index());
            // Buffers were taken in the order of the pool, so the place is looked up by page.
            let at = match self.pages.get(index) {
                Some(page) if page.page.is_same(part.buffer.page()) => Some(index),
                _ => self.pages.iter().position(|page| page.page.is_same(part.buffer.page())),
            };
            match at {
                Some(at) => self.buffers[at] = Some(part.buffer),
                // Replaced at the end of a connection.
                None => self.front.give_back(part.buffer),
            }
        }
        self.spare.push(parts);
    }

    fn fail(&mut self, tag: Tag, error: DiskError) {
        self.failed.push_back(Completion { tag, result: Err(error) });
    }

    fn queue(&mut self, request: &Request<'_>) -> Result<(), Error> {
        let (tag, sector) = (u64::from(request.tag.0), request.sector);
        match request.operation {
            Operation::Flush => self.front.flush(&mut self.env, tag),
            Operation::Discard => self.front.discard(&mut self.env, tag, sector, request.sectors),
            Operation::WriteZeroes => Err(Error::Unsupported),
            Operation::Read | Operation::Write => {
                let parts = self.parts(request).ok_or(Error::BadRequest)?;
                let queued = match request.operation {
                    Operation::Write => self.front.write(&mut self.env, tag, sector, parts),
                    _ => self.front.read(&mut self.env, tag, sector, parts),
                };
                queued.map_err(|refused| {
                    self.put(refused.parts);
                    refused.error
                })
            }
        }
    }
}

impl<E: Env> Disk for FrontDisk<E> {
    fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    fn submit(&mut self, request: Request<'_>) -> Result<(), Busy> {
        match self.queue(&request) {
            Ok(()) => Ok(()),
            Err(Error::Full) => Err(Busy),
            // Completed writes are durable.
            Err(Error::Unsupported) if request.operation == Operation::Flush => {
                self.failed.push_back(Completion { tag: request.tag, result: Ok(()) });
                Ok(())
            }
            Err(error) => {
                self.fail(request.tag, disk_error(error));
                Ok(())
            }
        }
    }

    fn kick(&mut self) {
        self.front.kick(&mut self.env);
    }

    fn complete(&mut self) -> Option<Completion> {
        if let Some(failed) = self.failed.pop_front() {
            return Some(failed);
        }
        let done = self.front.complete(&mut self.env).ok()??;
        self.put(done.parts);
        let result = match (done.result, done.operation) {
            // Completed writes are durable.
            (Ok(()), _) | (Err(IoError::Unsupported), FrontOperation::Flush) => Ok(()),
            (Err(IoError::Unsupported), _) => Err(DiskError::Unsupported),
            (Err(IoError::Failed), _) => Err(DiskError::Failed),
            (Err(IoError::Lost), _) => Err(DiskError::Aborted),
        };
        let tag = Tag(u32::try_from(done.tag).unwrap_or(u32::MAX));
        Some(Completion { tag, result })
    }
}

const fn disk_error(error: Error) -> DiskError {
    match error {
        Error::BadRequest => DiskError::OutOfRange,
        Error::ReadOnly => DiskError::ReadOnly,
        Error::Unsupported => DiskError::Unsupported,
        Error::NotConnected | Error::Full | Error::Broken(_) => DiskError::Aborted,
    }
}
