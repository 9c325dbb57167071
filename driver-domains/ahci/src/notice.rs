//! What is worth a line in the log.

use crate::engine::TaskFile;
use crate::identify::Unusable;
use alloc::collections::VecDeque;
use core::fmt;
use domain_api::disk::DiskError;

/// Most events that are kept until somebody asks for them; more are counted alone.
const MAX: usize = 8;

/// Something that happened at a port.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Event {
    /// The device on the port is not served.
    Ignored(Unusable),
    /// A command failed for good.
    Failed(DiskError, TaskFile),
    /// Commands failed and are tried again, so many of them.
    Retried(u32, TaskFile),
    /// The link went away or came back.
    LinkLost,
    /// So many commands took too long.
    TimedOut(u32),
    /// The disk works again after a reset of its link.
    Reset,
    /// A flush was failed, as the cache may have lost its content with the link.
    FlushRefused,
    /// The disk is given up.
    GivenUp(Unusable),
    /// So many more events are not told.
    Dropped(u32),
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ignored(why) => write!(f, "not served: {why}"),
            Self::Failed(error, file) => write!(f, "a command failed: {error} ({file})"),
            Self::Retried(count, file) => write!(f, "{count} commands are tried again ({file})"),
            Self::LinkLost => f.write_str("the link changed"),
            Self::TimedOut(count) => write!(f, "{count} commands took too long"),
            Self::Reset => f.write_str("works again after a reset"),
            Self::FlushRefused => f.write_str("a flush failed: the cache may have been lost"),
            Self::GivenUp(why) => write!(f, "given up: {why}"),
            Self::Dropped(count) => write!(f, "{count} more events"),
        }
    }
}

impl fmt::Display for TaskFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "status {:#04x}, error {:#04x}", self.status, self.error)
    }
}

/// Events of a port. A disk that fails without end does not fill memory or log.
#[derive(Debug, Default)]
pub struct Notices {
    events: VecDeque<Event>,
    dropped: u32,
}

impl Notices {
    pub fn add(&mut self, event: Event) {
        if self.events.len() < MAX {
            self.events.push_back(event);
        } else {
            self.dropped = self.dropped.saturating_add(1);
        }
    }

    pub fn take(&mut self) -> Option<Event> {
        self.events.pop_front().or_else(|| {
            let dropped = core::mem::take(&mut self.dropped);
            (dropped != 0).then_some(Event::Dropped(dropped))
        })
    }
}
