//! Paths of nodes.

use alloc::format;
use alloc::rc::Rc;
use alloc::string::String;
use xen_abi::xenstore::{ABS_PATH_MAX, REL_PATH_MAX};
use xen_abi::{DomainId, Errno};

/// Most components of a path. Deeper trees serve nobody, and the limit bounds every recursion
/// over the tree.
pub(crate) const DEPTH_MAX: usize = 64;

/// A valid absolute path: `/`, or `/` and names with single slashes between them.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct Path(Rc<str>);

impl Path {
    /// Checks a path as a client sent it, and makes it absolute.
    pub(crate) fn parse(text: &str, caller: DomainId) -> Result<Self, Errno> {
        if is_absolute(text) {
            if text.len() > ABS_PATH_MAX || (text.len() > 1 && !names_are_valid(&text[1..])) {
                return Err(Errno::EINVAL);
            }
            return Self(text.into()).checked();
        }
        if text.len() > REL_PATH_MAX || text.starts_with('@') || !names_are_valid(text) {
            return Err(Errno::EINVAL);
        }
        Self(format!("{}/{text}", home(caller)).into()).checked()
    }

    fn checked(self) -> Result<Self, Errno> {
        if self.names().count() > DEPTH_MAX { Err(Errno::EINVAL) } else { Ok(self) }
    }

    /// The names from the root down.
    pub(crate) fn names(&self) -> impl DoubleEndedIterator<Item = &str> {
        // The root has none.
        self.0[1..].split('/').filter(|name| !name.is_empty())
    }

    /// The path of the first `depth` names.
    pub(crate) fn ancestor(&self, depth: usize) -> Self {
        if depth == 0 {
            return Self("/".into());
        }
        let end = self.0.match_indices('/').nth(depth).map_or(self.0.len(), |(at, _)| at);
        Self(self.0[..end].into())
    }

    /// The parent and the last name; `None` for the root.
    pub(crate) fn split_last(&self) -> Option<(Self, &str)> {
        let at = self.0.rfind('/')?;
        let name = &self.0[at + 1..];
        if name.is_empty() {
            return None;
        }
        Some((Self(if at == 0 { "/" } else { &self.0[..at] }.into()), name))
    }

    pub(crate) fn is_root(&self) -> bool {
        &*self.0 == "/"
    }

    /// What has to be appended to `ancestor` to get this path: empty for itself. `None` when it
    /// is not at or below `ancestor`.
    pub(crate) fn below(&self, ancestor: &Self) -> Option<&str> {
        if ancestor.is_root() {
            return Some(&self.0);
        }
        let rest = self.0.strip_prefix(&*ancestor.0)?;
        (rest.is_empty() || rest.starts_with('/')).then_some(rest)
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

/// Whether a client's path is absolute.
pub(crate) fn is_absolute(text: &str) -> bool {
    text.starts_with('/')
}

/// Where relative paths of a domain start.
pub(crate) fn home(domid: DomainId) -> String {
    xenbus::device::home(domid)
}

/// Whether `text` is one name or more, of allowed characters, with single slashes between them.
fn names_are_valid(text: &str) -> bool {
    text.split('/').all(|name| {
        !name.is_empty()
            && name
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'@'))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<String, Errno> {
        Path::parse(text, DomainId(7)).map(|path| path.as_str().into())
    }

    /// xen-abi §6.2: characters, no `//`, no trailing `/`, relative to the caller's home.
    #[test]
    fn paths_are_checked_and_made_absolute() {
        for good in ["/", "/a", "/A-b_c@0/9", "/@x"] {
            assert_eq!(parse(good).as_deref(), Ok(good));
        }
        assert_eq!(parse("a/b").as_deref(), Ok("/local/domain/7/a/b"));
        for bad in ["", "//", "/a/", "a/", "/a//b", "@x", "/a b", "/ä", "/a.b", "/a\n", "a//b"] {
            assert_eq!(parse(bad), Err(Errno::EINVAL), "{bad}");
        }
    }

    #[test]
    fn absolute_paths_have_3072_bytes_and_relative_ones_2048() {
        let name = "x".repeat(3071);
        assert!(parse(&format!("/{name}")).is_ok());
        assert_eq!(parse(&format!("/{name}x")), Err(Errno::EINVAL));
        assert!(parse(&name[..2048]).is_ok());
        assert_eq!(parse(&name[..2049]), Err(Errno::EINVAL));
        assert!(parse(&"/x".repeat(DEPTH_MAX)).is_ok());
        assert_eq!(parse(&"/x".repeat(DEPTH_MAX + 1)), Err(Errno::EINVAL));
    }

    #[test]
    fn relations_between_paths() {
        let path = |text| Path::parse(text, DomainId(0)).unwrap();
        let (root, a, ab, abc) = (path("/"), path("/a"), path("/a/b"), path("/a/bc"));
        assert_eq!(ab.below(&a), Some("/b"));
        assert_eq!(ab.below(&ab), Some(""));
        assert_eq!(abc.below(&ab), None);
        assert_eq!(a.below(&root), Some("/a"));
        assert_eq!(root.below(&a), None);
        assert_eq!(ab.split_last(), Some((a.clone(), "b")));
        assert_eq!(a.split_last(), Some((root.clone(), "a")));
        assert_eq!(root.split_last(), None);
        assert_eq!(ab.ancestor(0), root);
        assert_eq!(ab.ancestor(1), a);
        assert_eq!(ab.ancestor(2), ab);
        assert_eq!(root.names().count(), 0);
        assert!(ab.names().eq(["a", "b"]));
    }
}
