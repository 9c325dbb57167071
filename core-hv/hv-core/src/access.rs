//! Memory of domains as the core reads and writes it: by software translation, with the access
//! that the domain itself has, across pages, and never through a reference.

use crate::p2m::{Kind, P2m, Page};
use crate::platform::Platform;
use crate::state::Core;
use xen_abi::{DomainId, Errno, Gfn};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// The part of one page that an access touches.
#[derive(Clone, Copy, Debug)]
pub struct Piece {
    /// The page.
    pub page: Page,
    /// Bytes into it.
    pub offset: usize,
    /// Bytes of it.
    pub len: usize,
}

/// Translates the first page of an access of `len` bytes at `gpa`.
///
/// # Errors
/// `EFAULT`: nothing there, or device registers.
pub fn piece<P: Platform>(p: &P, p2m: &P2m, gpa: u64, len: usize) -> Result<Piece, Errno> {
    let page = p2m.page(p, Gfn::containing(gpa)).ok_or(Errno::EFAULT)?;
    if page.kind == Kind::Device {
        return Err(Errno::EFAULT);
    }
    let offset = (gpa & 0xfff) as usize;
    Ok(Piece { page, offset, len: len.min(4096 - offset) })
}

/// Reads memory of a domain.
///
/// # Errors
/// `EFAULT`: part of it cannot be read. `buffer` is then undefined.
pub fn read<P: Platform>(p: &P, p2m: &P2m, mut gpa: u64, buffer: &mut [u8]) -> Result<(), Errno> {
    let mut rest = buffer;
    while !rest.is_empty() {
        let piece = piece(p, p2m, gpa, rest.len())?;
        let (now, later) = rest.split_at_mut(piece.len);
        p.read(piece.page.mfn, piece.offset, now);
        gpa = gpa.wrapping_add(piece.len as u64);
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
        let piece = piece(p, p2m, gpa, rest.len())?;
        if !piece.page.write {
            return Err(Errno::EFAULT);
        }
        let (now, later) = rest.split_at(piece.len);
        p.write(piece.page.mfn, piece.offset, now);
        gpa = gpa.wrapping_add(piece.len as u64);
        rest = later;
    }
    Ok(())
}

impl<P: Platform> Core<P> {
    /// Reads an argument structure of a running domain, once.
    pub(crate) fn get<T: FromBytes + IntoBytes>(
        &self,
        p: &P,
        id: DomainId,
        gpa: u64,
    ) -> Result<T, Errno> {
        let mut value = T::new_zeroed();
        read(p, &self.me(id).p2m, gpa, value.as_mut_bytes())?;
        Ok(value)
    }

    /// Writes a result structure.
    pub(crate) fn put<T: IntoBytes + Immutable>(
        &self,
        p: &mut P,
        id: DomainId,
        gpa: u64,
        value: &T,
    ) -> Result<(), Errno> {
        write(p, &self.me(id).p2m, gpa, value.as_bytes())
    }
}
