//! Hooks for a simulation that runs the code of several domains on one thread (feature `sim`).
//!
//! While the simulation lets a domain run it has that domain's [`Hooks`] installed. Then every
//! access to a page is announced before it happens, which is where the simulation may let others
//! go on, or end the domain's life; and new pages are the domain's memory. Without hooks nothing
//! changes.

use crate::Page;
use std::cell::Cell;

/// What a simulation wants to know of a domain that runs.
#[derive(Clone, Copy, Debug)]
pub struct Hooks {
    /// Called before each access to a page; before the first and the last word of a long copy.
    /// May take as long as it likes, and may unwind.
    pub access: fn(),
    /// A page of zeros of the domain's memory.
    pub allocate: fn() -> Page,
}

thread_local! {
    static HOOKS: Cell<Option<Hooks>> = const { Cell::new(None) };
}

/// Installs hooks on this thread, or takes them away; returns those that were there.
pub fn install(hooks: Option<Hooks>) -> Option<Hooks> {
    HOOKS.replace(hooks)
}

/// Whether accesses are announced at present.
#[must_use]
pub fn is_watched() -> bool {
    HOOKS.get().is_some()
}

/// Runs `work` without hooks: for what is not done by the domain's own instructions.
pub fn unwatched<R>(work: impl FnOnce() -> R) -> R {
    struct Restore(Option<Hooks>);
    impl Drop for Restore {
        fn drop(&mut self) {
            install(self.0);
        }
    }
    let _restore = Restore(install(None));
    work()
}

#[inline]
pub(crate) fn access() {
    if let Some(hooks) = HOOKS.get() {
        (hooks.access)();
    }
}

pub(crate) fn allocate() -> Option<Page> {
    HOOKS.get().map(|hooks| (hooks.allocate)())
}
