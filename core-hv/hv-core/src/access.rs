//! Memory of domains as the core reads and writes it: by software translation, with the access
//! that the domain itself has, across pages, and never through a reference.

use crate::domain::Domain;
use crate::frame::Mfn;
use crate::p2m::P2m;
use crate::platform::Platform;
use crate::pvh::walk::translate;
use crate::state::Core;
use xen_abi::{DomainId, Errno, Gfn};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Where the first page of an access of `len` bytes at `gpa` is, and how many of them are in it.
///
/// # Errors
/// `EFAULT`: nothing there, device registers, or not to be written.
#[inline]
fn reach<P: Platform>(
    p: &P,
    p2m: &P2m,
    gpa: u64,
    len: usize,
    write: bool,
) -> Result<(Mfn, usize, usize), Errno> {
    let mfn = p2m.memory(p, Gfn::containing(gpa), write).ok_or(Errno::EFAULT)?;
    Ok((mfn, (gpa & 0xfff) as usize, in_page(gpa, len)))
}

/// Reads memory of a domain.
///
/// # Errors
/// `EFAULT`: part of it cannot be read. `buffer` is then undefined.
pub fn read<P: Platform>(p: &P, p2m: &P2m, mut gpa: u64, buffer: &mut [u8]) -> Result<(), Errno> {
    let mut rest = buffer;
    while !rest.is_empty() {
        let (mfn, offset, len) = reach(p, p2m, gpa, rest.len(), false)?;
        let (now, later) = rest.split_at_mut(len);
        p.read(mfn, offset, now);
        gpa = gpa.wrapping_add(len as u64);
        rest = later;
    }
    Ok(())
}

/// Writes memory of a domain that the domain itself may write.
///
/// # Errors
/// `EFAULT`: part of it cannot be written; what comes before that part is.
pub fn write<P: Platform>(p: &mut P, p2m: &P2m, mut gpa: u64, bytes: &[u8]) -> Result<(), Errno> {
    let mut rest = bytes;
    while !rest.is_empty() {
        let (mfn, offset, len) = reach(p, p2m, gpa, rest.len(), true)?;
        let (now, later) = rest.split_at(len);
        p.write(mfn, offset, now);
        gpa = gpa.wrapping_add(len as u64);
        rest = later;
    }
    Ok(())
}

impl<P: Platform> Core<P> {
    /// Reads memory of a domain whose vCPU is in the core, by an address as that vCPU has it: a
    /// unikernel's is guest-physical, a kernel's own goes through its page tables.
    ///
    /// # Errors
    /// `EFAULT`, as [`read`].
    pub(crate) fn read_caller(
        &self,
        p: &P,
        id: DomainId,
        address: u64,
        buffer: &mut [u8],
    ) -> Result<(), Errno> {
        let domain = self.me(id);
        if domain.pvh.is_none() {
            return read(p, &domain.p2m, address, buffer);
        }
        let mut done = 0;
        while done < buffer.len() {
            let at = address.wrapping_add(done as u64);
            let gpa = self.linear(p, domain, at, false)?;
            let len = in_page(at, buffer.len() - done);
            read(p, &domain.p2m, gpa, &mut buffer[done..done + len])?;
            done += len;
        }
        Ok(())
    }

    /// Writes memory, as [`Self::read_caller`].
    ///
    /// # Errors
    /// `EFAULT`, as [`write`].
    pub(crate) fn write_caller(
        &self,
        p: &mut P,
        id: DomainId,
        address: u64,
        bytes: &[u8],
    ) -> Result<(), Errno> {
        let domain = self.me(id);
        if domain.pvh.is_none() {
            return write(p, &domain.p2m, address, bytes);
        }
        let mut done = 0;
        while done < bytes.len() {
            let at = address.wrapping_add(done as u64);
            let gpa = self.linear(p, domain, at, true)?;
            let len = in_page(at, bytes.len() - done);
            write(p, &domain.p2m, gpa, &bytes[done..done + len])?;
            done += len;
        }
        Ok(())
    }

    /// The guest-physical address of what the acting vCPU of a domain calls `address`.
    fn linear(&self, p: &P, domain: &Domain<P>, address: u64, write: bool) -> Result<u64, Errno> {
        let mode = &domain.vcpu().virt.mode;
        translate(p, &domain.p2m, mode, address, write).ok_or(Errno::EFAULT)
    }

    /// Reads an argument structure of a running domain, once.
    pub(crate) fn get<T: FromBytes + IntoBytes>(
        &self,
        p: &P,
        id: DomainId,
        address: u64,
    ) -> Result<T, Errno> {
        let mut value = T::new_zeroed();
        self.read_caller(p, id, address, value.as_mut_bytes())?;
        Ok(value)
    }

    /// Writes a result structure.
    pub(crate) fn put<T: IntoBytes + Immutable>(
        &self,
        p: &mut P,
        id: DomainId,
        address: u64,
        value: &T,
    ) -> Result<(), Errno> {
        self.write_caller(p, id, address, value.as_bytes())
    }
}

/// How much of an access is in its first page.
fn in_page(address: u64, len: usize) -> usize {
    len.min(4096 - (address & 0xfff) as usize)
}
