//! Watches, and whom a change concerns.

use crate::change::Notice;
use crate::path::{Path, home, is_absolute};
use crate::perms::Caller;
use alloc::boxed::Box;
use alloc::string::String;
use xen_abi::{DomainId, Errno};

/// What happens to domains, for those who may know.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Special {
    /// `@introduceDomain`: a domain was connected.
    Introduce,
    /// `@releaseDomain`: a domain was disconnected.
    Release,
}

impl Special {
    const fn name(self) -> &'static str {
        match self {
            Self::Introduce => "@introduceDomain",
            Self::Release => "@releaseDomain",
        }
    }
}

#[derive(Clone, PartialEq, Eq, Debug)]
enum Target {
    Node(Path),
    Special(Special),
}

/// A watch of one connection.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Watch {
    target: Target,
    /// Bytes that are left out at the front of event paths: the home, when it was set relative.
    hidden: usize,
    pub(crate) token: Box<str>,
}

impl Watch {
    /// Checks what a client asks for.
    pub(crate) fn parse(path: &str, token: &str, caller: Caller) -> Result<Self, Errno> {
        let token = Box::from(token);
        if path.starts_with('@') {
            let special = [Special::Introduce, Special::Release]
                .into_iter()
                .find(|special| special.name() == path)
                .ok_or(Errno::EINVAL)?;
            return if caller.is_privileged() {
                Ok(Self { target: Target::Special(special), hidden: 0, token })
            } else {
                Err(Errno::EACCES)
            };
        }
        let target = Target::Node(Path::parse(path, caller.domid)?);
        let hidden = if is_absolute(path) { 0 } else { hidden_by(caller.domid) };
        Ok(Self { target, hidden, token })
    }

    /// The path as the client gave it.
    pub(crate) fn path(&self) -> &str {
        match &self.target {
            Target::Node(path) => &path.as_str()[self.hidden..],
            Target::Special(special) => special.name(),
        }
    }

    /// Bytes of path and token.
    pub(crate) fn cost(&self) -> usize {
        self.path().len() + self.token.len()
    }

    pub(crate) fn is_for(&self, special: Special) -> bool {
        self.target == Target::Special(special)
    }

    /// The path of the event that `notice` is to the watch of `reader`, if it is one: that of the
    /// changed node, at the watched one or below it; or that of the watched node itself, when it
    /// went with one above.
    pub(crate) fn event(&self, notice: &Notice, reader: Caller) -> Option<String> {
        let Target::Node(watched) = &self.target else { return None };
        let seen = if notice.path.below(watched).is_some() {
            let readable = notice.readable.iter().any(|perms| reader.may_read(perms));
            readable.then_some(&notice.path)
        } else {
            vanished(watched, notice, reader).then_some(watched)
        };
        seen.map(|path| String::from(&path.as_str()[self.hidden..]))
    }
}

fn hidden_by(domid: DomainId) -> usize {
    home(domid).len() + 1
}

/// Whether the watched node went with a removed one above it, and `reader` may know.
fn vanished(watched: &Path, notice: &Notice, reader: Caller) -> bool {
    let Some(root) = &notice.removed else { return false };
    let Some(rest) = watched.below(&notice.path) else { return false };
    let names = || rest.split('/').filter(|name| !name.is_empty());
    let depth = names().count();
    let Some(node) = root.descendant(names()) else { return false };
    let parent = root.descendant(names().take(depth.saturating_sub(1)));
    reader.may_read(&node.perms) || parent.is_some_and(|parent| reader.may_read(&parent.perms))
}
