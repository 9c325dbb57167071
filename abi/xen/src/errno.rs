//! Error numbers that hypercalls answer with, negated, in the result register.
//!
//! Source: `xen/include/public/errno.h`.

/// A Xen error number. The value is positive; a hypercall returns its negation.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct Errno(pub u16);

macro_rules! errnos {
    ($($name:ident = $value:literal, $meaning:literal;)*) => {
        impl Errno {
            $(#[doc = $meaning] pub const $name: Self = Self($value);)*

            /// The symbolic name, such as `EINVAL`, as xenstore sends it.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$name => stringify!($name),)* _ => "EUNKNOWN" }
            }

            /// The number behind a symbolic name, if it is one of ours.
            #[must_use]
            pub fn from_name(name: &str) -> Option<Self> {
                match name { $(stringify!($name) => Some(Self::$name),)* _ => None }
            }
        }
    };
}

errnos! {
    EPERM = 1, "Operation not permitted.";
    ENOENT = 2, "No such entry.";
    ESRCH = 3, "No such domain.";
    EIO = 5, "Input/output error.";
    ENXIO = 6, "No such address.";
    E2BIG = 7, "Argument list too long.";
    EAGAIN = 11, "Try again.";
    ENOMEM = 12, "Out of memory.";
    EACCES = 13, "Permission denied.";
    EFAULT = 14, "Bad address.";
    EBUSY = 16, "Busy.";
    EEXIST = 17, "Exists already.";
    EXDEV = 18, "Cross-device link.";
    ENODEV = 19, "No such device.";
    EISDIR = 21, "Is a directory.";
    EINVAL = 22, "Invalid argument.";
    ENOSPC = 28, "No space left.";
    EROFS = 30, "Read-only.";
    ERANGE = 34, "Out of range.";
    ENOSYS = 38, "Not implemented.";
    ENOTEMPTY = 39, "Not empty.";
    ENODATA = 61, "No data.";
    ETIME = 62, "Timer expired.";
    EOPNOTSUPP = 95, "Operation not supported.";
    ENOBUFS = 105, "No buffer space.";
    EISCONN = 106, "Connected already.";
}

impl Errno {
    /// The value of the result register for this error.
    #[must_use]
    pub const fn to_result(self) -> i64 {
        -(self.0 as i64)
    }

    /// Splits a result register: `Ok` for zero and above, the error otherwise.
    ///
    /// # Errors
    /// The error number that a negative `result` stands for; one out of range becomes `EIO`.
    pub const fn from_result(result: i64) -> Result<u64, Self> {
        if result >= 0 {
            return Ok(result.cast_unsigned());
        }
        if result < -4095 {
            return Err(Self::EIO);
        }
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "-4095..=-1")]
        Err(Self(-result as u16))
    }
}

impl core::fmt::Debug for Errno {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{}({})", self.name(), self.0)
    }
}

impl core::fmt::Display for Errno {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(self.name())
    }
}

impl core::error::Error for Errno {}
