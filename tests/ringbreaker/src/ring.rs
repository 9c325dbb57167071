//! A frontend's end of a ring that lets everything happen.

use core::sync::atomic::Ordering::SeqCst;
use shmem::Page;
use xen_abi::PAGE_SIZE;
use xen_abi::ring::{REQ_EVENT, REQ_PROD, RSP_EVENT, RSP_PROD, SLOTS, slots};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// A ring of one page. Counters are ours; only [`Ring::show`] lets the backend see them.
pub struct Ring {
    page: Page,
    slot_bytes: usize,
    len: u32,
    /// Index behind the last request.
    pub made: u32,
    /// Index behind the last response that was looked at.
    pub taken: u32,
}

impl Ring {
    /// An empty one.
    pub fn new(slot_bytes: usize) -> Self {
        let page = Page::new_zeroed();
        page.u32(REQ_EVENT).store(1, SeqCst);
        page.u32(RSP_EVENT).store(1, SeqCst);
        Self { page, slot_bytes, len: slots(PAGE_SIZE, slot_bytes), made: 0, taken: 0 }
    }

    /// The page.
    pub fn page(&self) -> &Page {
        &self.page
    }

    /// Slots.
    pub fn len(&self) -> u32 {
        self.len
    }

    /// Slots that hold nothing.
    pub fn free(&self) -> u32 {
        self.len - self.made.wrapping_sub(self.taken)
    }

    fn at(&self, index: u32) -> usize {
        SLOTS + (index & (self.len - 1)) as usize * self.slot_bytes
    }

    /// Writes into a slot, whoever it belongs to.
    pub fn write(&self, index: u32, entry: &(impl IntoBytes + Immutable)) {
        self.page.write(self.at(index), entry.as_bytes());
    }

    /// What is in a slot.
    pub fn read<T: FromBytes + IntoBytes>(&self, index: u32) -> T {
        let mut entry = T::new_zeroed();
        self.page.read(self.at(index), entry.as_mut_bytes());
        entry
    }

    /// Makes a request; its index.
    pub fn push(&mut self, entry: &(impl IntoBytes + Immutable)) -> u32 {
        let index = self.made;
        self.write(index, entry);
        self.made = index.wrapping_add(1);
        index
    }

    /// Shows the backend any number of requests.
    pub fn show(&self, made: u32) {
        self.page.u32(REQ_PROD).store(made, SeqCst);
    }

    /// Any word of the ring's head.
    pub fn poke(&self, offset: usize, value: u32) {
        self.page.u32(offset).store(value, SeqCst);
    }

    /// Responses that the backend shows.
    pub fn answered(&self) -> u32 {
        self.page.u32(RSP_PROD).load(SeqCst)
    }

    /// The index of the next response, if there is one. Asks for an event with the one behind it.
    pub fn next(&mut self) -> Option<u32> {
        let answered = self.answered();
        if answered == self.taken {
            self.page.u32(RSP_EVENT).store(answered.wrapping_add(1), SeqCst);
            return None;
        }
        let index = self.taken;
        self.taken = index.wrapping_add(1);
        Some(index)
    }
}
