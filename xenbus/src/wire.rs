//! Messages as bytes.
//!
//! A message is a [`Header`] of four little-endian `u32` and its payload. Messages follow each
//! other without gaps in a stream that may be cut anywhere, so a [`Decoder`] keeps what it has.
//! It never holds more than one message.
//!
//! Source: `xen/include/public/io/xs_wire.h`, `docs/misc/xenstore.txt`.

use alloc::vec::Vec;
use core::fmt;
use core::mem::{size_of, take};
use xen_abi::xenstore::{Header, MessageKind, PAYLOAD_MAX};
use xen_abi::{DomainId, Errno};
use zerocopy::{FromBytes, IntoBytes};

/// Bytes of a message's header.
pub const HEADER_BYTES: usize = size_of::<Header>();

/// A whole message.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Message {
    /// What is asked or answered.
    pub kind: MessageKind,
    /// Chosen by the client, echoed in the reply; 0 in watch events.
    pub req_id: u32,
    /// Transaction, 0 for none.
    pub tx_id: u32,
    /// At most [`PAYLOAD_MAX`] bytes.
    pub payload: Vec<u8>,
}

impl Message {
    /// Appends the message to `out`.
    ///
    /// # Errors
    /// `E2BIG` when the payload is longer than [`PAYLOAD_MAX`]; `out` is as before.
    pub fn encode(&self, out: &mut Vec<u8>) -> Result<(), Errno> {
        encode(out, self.kind, self.req_id, self.tx_id, &[&self.payload])
    }
}

/// Appends a message to `out` whose payload is the concatenation of `parts`.
///
/// # Errors
/// `E2BIG` when the payload is longer than [`PAYLOAD_MAX`]; `out` is as before.
pub fn encode(
    out: &mut Vec<u8>,
    kind: MessageKind,
    req_id: u32,
    tx_id: u32,
    parts: &[&[u8]],
) -> Result<(), Errno> {
    let len: usize = parts.iter().map(|part| part.len()).sum();
    if len > PAYLOAD_MAX {
        return Err(Errno::E2BIG);
    }
    let len_field = u32::try_from(len).map_err(|_| Errno::E2BIG)?;
    out.reserve(HEADER_BYTES + len);
    out.extend_from_slice(Header { kind, req_id, tx_id, len: len_field }.as_bytes());
    for part in parts {
        out.extend_from_slice(part);
    }
    Ok(())
}

/// The peer announced a payload longer than [`PAYLOAD_MAX`]. Where the next message starts is
/// then unknown: the connection cannot be used any more.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Oversized {
    /// What was announced.
    pub header: Header,
}

/// Finds messages in a stream of bytes.
#[derive(Clone, Default, Debug)]
pub struct Decoder {
    head: Vec<u8>,
    header: Option<Header>,
    payload: Vec<u8>,
}

impl Decoder {
    /// A decoder at the start of a message.
    #[must_use]
    pub const fn new() -> Self {
        Self { head: Vec::new(), header: None, payload: Vec::new() }
    }

    /// Takes bytes from the front of `input` until a message is complete, or all are taken. Call
    /// again while `input` is not empty.
    ///
    /// # Errors
    /// [`Oversized`]; the decoder must then not be used again.
    pub fn feed(&mut self, input: &mut &[u8]) -> Result<Option<Message>, Oversized> {
        let Some(header) = self.feed_header(input)? else { return Ok(None) };
        let len = header.len as usize;
        move_bytes(input, &mut self.payload, len);
        if self.payload.len() < len {
            return Ok(None);
        }
        self.header = None;
        let Header { kind, req_id, tx_id, .. } = header;
        Ok(Some(Message { kind, req_id, tx_id, payload: take(&mut self.payload) }))
    }

    /// How many bytes of an incomplete message are held.
    #[must_use]
    pub fn held(&self) -> usize {
        match self.header {
            Some(_) => HEADER_BYTES + self.payload.len(),
            None => self.head.len(),
        }
    }

    /// How many bytes may be fed without reaching beyond the end of the current message. Not 0.
    #[must_use]
    pub fn wanted(&self) -> usize {
        match self.header {
            Some(header) => header.len as usize - self.payload.len(),
            None => HEADER_BYTES - self.head.len(),
        }
    }

    /// Appends the bytes of the incomplete message to `out`, as they came in.
    pub fn save(&self, out: &mut Vec<u8>) {
        match &self.header {
            Some(header) => out.extend_from_slice(header.as_bytes()),
            None => out.extend_from_slice(&self.head),
        }
        out.extend_from_slice(&self.payload);
    }

    fn feed_header(&mut self, input: &mut &[u8]) -> Result<Option<Header>, Oversized> {
        if let Some(header) = self.header {
            return Ok(Some(header));
        }
        move_bytes(input, &mut self.head, HEADER_BYTES);
        let Ok(header) = Header::read_from_bytes(&self.head) else { return Ok(None) };
        if header.len as usize > PAYLOAD_MAX {
            return Err(Oversized { header });
        }
        self.head.clear();
        self.header = Some(header);
        Ok(Some(header))
    }
}

/// Moves bytes from the front of `input` to the end of `to`, until `to` has `len`.
fn move_bytes(input: &mut &[u8], to: &mut Vec<u8>, len: usize) {
    let (taken, rest) = input.split_at(input.len().min(len - to.len()));
    to.extend_from_slice(taken);
    *input = rest;
}

/// The NUL-terminated strings of a payload. `None` when the last one has no NUL, or one is not
/// UTF-8. An empty payload has no strings.
pub fn strings(payload: &[u8]) -> Option<Vec<&str>> {
    let Some((&0, body)) = payload.split_last() else {
        return payload.is_empty().then(Vec::new);
    };
    body.split(|&byte| byte == 0).map(|part| core::str::from_utf8(part).ok()).collect()
}

/// What a permission entry lets its domain do with a node.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NodeAccess {
    /// `n`: nothing.
    None,
    /// `r`: read the value, list the children.
    Read,
    /// `w`: write the value, create and remove children.
    Write,
    /// `b`: both.
    Both,
}

impl NodeAccess {
    /// Whether reading is included.
    #[must_use]
    pub const fn reads(self) -> bool {
        matches!(self, Self::Read | Self::Both)
    }

    /// Whether writing is included.
    #[must_use]
    pub const fn writes(self) -> bool {
        matches!(self, Self::Write | Self::Both)
    }

    const fn letter(self) -> char {
        match self {
            Self::None => 'n',
            Self::Read => 'r',
            Self::Write => 'w',
            Self::Both => 'b',
        }
    }
}

/// One entry of a node's permissions. The first entry of a node names its owner, who may do
/// everything; its access is what domains without an entry have. The others speak for their
/// domain.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Permission {
    /// What.
    pub access: NodeAccess,
    /// Whose.
    pub domid: DomainId,
}

impl Permission {
    /// Owner `domid`; everybody else may do nothing. First entry of a node's permissions.
    #[must_use]
    pub const fn owner(domid: DomainId) -> Self {
        Self { access: NodeAccess::None, domid }
    }

    /// `domid` may read.
    #[must_use]
    pub const fn reader(domid: DomainId) -> Self {
        Self { access: NodeAccess::Read, domid }
    }

    /// Reads the wire's form: a letter of `nrwb` and a decimal domain id, such as `r3`.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let access = match text.as_bytes().first()? {
            b'n' => NodeAccess::None,
            b'r' => NodeAccess::Read,
            b'w' => NodeAccess::Write,
            b'b' => NodeAccess::Both,
            _ => return None,
        };
        Some(Self { access, domid: parse_domid(&text[1..])? })
    }
}

impl fmt::Display for Permission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.access.letter(), self.domid.0)
    }
}

/// Reads a decimal domain id: digits only, below [`DomainId::FIRST_RESERVED`].
#[must_use]
pub fn parse_domid(text: &str) -> Option<DomainId> {
    parse_decimal(text)
        .and_then(|value| u16::try_from(value).ok())
        .filter(|&value| value < DomainId::FIRST_RESERVED)
        .map(DomainId)
}

/// Reads an unsigned decimal number: digits only, no sign.
#[must_use]
pub fn parse_decimal(text: &str) -> Option<u32> {
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    text.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::{collection::vec, prelude::*};

    fn message() -> impl Strategy<Value = Message> {
        (0_u32..30, any::<u32>(), any::<u32>(), vec(any::<u8>(), 0..200)).prop_map(
            |(kind, req_id, tx_id, payload)| Message {
                kind: MessageKind(kind),
                req_id,
                tx_id,
                payload,
            },
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 4 } else { 256 }))]

        /// However a stream is cut, the same messages come out of it.
        #[test]
        fn messages_survive_any_cut(messages in vec(message(), 0..6), cut in 1_usize..40) {
            let mut stream = Vec::new();
            for message in &messages {
                message.encode(&mut stream).unwrap();
            }
            let mut decoder = Decoder::new();
            let mut decoded = Vec::new();
            for mut piece in stream.chunks(cut) {
                while let Some(message) = decoder.feed(&mut piece).unwrap() {
                    decoded.push(message);
                }
                prop_assert!(piece.is_empty());
            }
            prop_assert_eq!(decoded, messages);
            prop_assert_eq!(decoder.held(), 0);
        }

        /// Whoever feeds no more than is wanted never has bytes left over from a message.
        #[test]
        fn wanted_bytes_belong_to_one_message(messages in vec(message(), 1..6)) {
            let mut stream = Vec::new();
            for message in &messages {
                message.encode(&mut stream).unwrap();
            }
            let mut decoder = Decoder::new();
            let mut decoded = Vec::new();
            let mut rest = &stream[..];
            while !rest.is_empty() {
                let (mut piece, more) = rest.split_at(decoder.wanted());
                prop_assert!(!piece.is_empty());
                decoded.extend(decoder.feed(&mut piece).unwrap());
                prop_assert!(piece.is_empty());
                rest = more;
            }
            prop_assert_eq!(decoded, messages);
        }

        /// A decoder that is replaced by one fed with its saved bytes goes on as if nothing happened.
        #[test]
        fn saved_bytes_restore_a_decoder(message in message(), at in 0_usize..216) {
            let mut stream = Vec::new();
            message.encode(&mut stream).unwrap();
            let at = at.min(stream.len() - 1);
            let mut first = Decoder::new();
            prop_assert_eq!(first.feed(&mut &stream[..at]).unwrap(), None);
            let mut saved = Vec::new();
            first.save(&mut saved);
            prop_assert_eq!(saved.len(), first.held());
            let mut second = Decoder::new();
            prop_assert_eq!(second.feed(&mut &saved[..]).unwrap(), None);
            prop_assert_eq!(second.feed(&mut &stream[at..]).unwrap(), Some(message));
        }

        /// No bytes make a decoder panic or hold more than one message.
        #[test]
        fn decoder_is_bounded(bytes in vec(any::<u8>(), 0..2000)) {
            let mut decoder = Decoder::new();
            let mut input = &bytes[..];
            while !input.is_empty() && decoder.feed(&mut input).is_ok() {
                prop_assert!(decoder.held() <= HEADER_BYTES + PAYLOAD_MAX);
            }
        }
    }

    #[test]
    fn a_payload_may_have_4096_bytes_and_not_one_more() {
        let mut out = Vec::new();
        let mut message =
            Message { kind: MessageKind::WRITE, req_id: 1, tx_id: 0, payload: vec![7; 4096] };
        message.encode(&mut out).unwrap();
        assert_eq!(Decoder::new().feed(&mut &out[..]), Ok(Some(message.clone())));
        message.payload.push(7);
        let before = out.len();
        assert_eq!(message.encode(&mut out), Err(Errno::E2BIG));
        assert_eq!(out.len(), before);
        out[12..16].copy_from_slice(&4097_u32.to_le_bytes());
        assert!(Decoder::new().feed(&mut &out[..]).is_err());
    }

    #[test]
    fn strings_need_their_nul() {
        assert_eq!(strings(b""), Some(vec![]));
        assert_eq!(strings(b"\0"), Some(vec![""]));
        assert_eq!(strings(b"a\0bc\0"), Some(vec!["a", "bc"]));
        assert_eq!(strings(b"a\0bc"), None);
        assert_eq!(strings(b"\xff\0"), None);
    }

    #[test]
    fn permissions_are_a_letter_and_a_domain() {
        for text in ["n0", "r1", "w65", "b32751"] {
            assert_eq!(Permission::parse(text).unwrap().to_string(), text);
        }
        for text in ["", "n", "x1", "r-1", "r+1", "r 1", "r32752", "r1x", "é1"] {
            assert_eq!(Permission::parse(text), None, "{text}");
        }
    }
}
