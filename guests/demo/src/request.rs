//! Heads of HTTP/1.x requests.
//!
//! Source: RFC 9112 (HTTP/1.1), sections 2 to 6. Refused rather than guessed at: bare carriage
//! returns, white space before a colon, folded lines, two different lengths, and every transfer
//! coding. These are the ways in which two readers can take one stream for different requests.

use alloc::string::String;

/// Longest head.
pub const MAX_HEAD: usize = 8192;

/// A request, but for its body.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Request {
    /// Method, as sent.
    pub method: String,
    /// Path without the query.
    pub path: String,
    /// Bytes of body, when announced.
    pub content_length: Option<u64>,
    /// Whether the client wants to send more requests on this connection.
    pub keep_alive: bool,
    /// Whether the client waits for a go-ahead before it sends the body.
    pub expects_continue: bool,
}

/// Why a head is refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum HeadError {
    /// Not a request of HTTP/1.x.
    Malformed,
    /// Longer than [`MAX_HEAD`].
    TooLong,
    /// Another major version.
    Version,
    /// A transfer coding.
    Coding,
}

impl HeadError {
    /// The status that answers it.
    #[must_use]
    pub fn status(self) -> u16 {
        match self {
            Self::Malformed => 400,
            Self::TooLong => 431,
            Self::Version => 505,
            Self::Coding => 501,
        }
    }
}

/// Reads a head at the beginning of `bytes`: the request and the head's length, or `None` while
/// its end has not come.
///
/// # Errors
/// See [`HeadError`].
pub fn parse(bytes: &[u8]) -> Result<Option<(Request, usize)>, HeadError> {
    let seen = &bytes[..bytes.len().min(MAX_HEAD)];
    let Some(end) = seen.windows(4).position(|w| w == b"\r\n\r\n") else {
        return if bytes.len() >= MAX_HEAD { Err(HeadError::TooLong) } else { Ok(None) };
    };
    let head = core::str::from_utf8(&seen[..end]).map_err(|_| HeadError::Malformed)?;
    if head.bytes().any(|b| b == 0) {
        return Err(HeadError::Malformed);
    }
    let mut lines = head.split("\r\n");
    let mut request = request_line(lines.next().unwrap_or(""))?;
    for line in lines {
        header(line, &mut request)?;
    }
    Ok(Some((request, end + 4)))
}

fn is_token(text: &str) -> bool {
    let special = |b| b"!#$%&'*+-.^_`|~".contains(&b);
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || special(b))
}

fn request_line(line: &str) -> Result<Request, HeadError> {
    let mut words = line.split(' ');
    let (Some(method), Some(target), Some(version), None) =
        (words.next(), words.next(), words.next(), words.next())
    else {
        return Err(HeadError::Malformed);
    };
    let visible = |text: &str| text.bytes().all(|b| b.is_ascii_graphic());
    if !is_token(method) || !target.starts_with('/') || !visible(target) {
        return Err(HeadError::Malformed);
    }
    let keep_alive = match version {
        "HTTP/1.1" => true,
        "HTTP/1.0" => false,
        _ if version.starts_with("HTTP/") => return Err(HeadError::Version),
        _ => return Err(HeadError::Malformed),
    };
    Ok(Request {
        method: method.into(),
        path: target.split('?').next().unwrap_or(target).into(),
        content_length: None,
        keep_alive,
        expects_continue: false,
    })
}

fn header(line: &str, request: &mut Request) -> Result<(), HeadError> {
    let (name, value) = line.split_once(':').ok_or(HeadError::Malformed)?;
    if !is_token(name) || value.contains(['\r', '\n']) {
        return Err(HeadError::Malformed);
    }
    let value = value.trim_matches([' ', '\t']);
    let is = |other: &str| name.eq_ignore_ascii_case(other);
    if is("content-length") {
        let length = length(value)?;
        if request.content_length.replace(length).is_some_and(|before| before != length) {
            return Err(HeadError::Malformed);
        }
    } else if is("transfer-encoding") {
        return Err(HeadError::Coding);
    } else if is("expect") {
        request.expects_continue = value.eq_ignore_ascii_case("100-continue");
    } else if is("connection") {
        for option in value.split(',').map(str::trim) {
            if option.eq_ignore_ascii_case("close") {
                request.keep_alive = false;
            } else if option.eq_ignore_ascii_case("keep-alive") {
                request.keep_alive = true;
            }
        }
    }
    Ok(())
}

/// A number without sign; more than fits is malformed too.
fn length(value: &str) -> Result<u64, HeadError> {
    if value.is_empty() || !value.bytes().all(|b| b.is_ascii_digit()) {
        return Err(HeadError::Malformed);
    }
    value.parse().map_err(|_| HeadError::Malformed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn request(text: &str) -> Result<Option<(Request, usize)>, HeadError> {
        parse(text.as_bytes())
    }

    #[test]
    fn what_curl_sends() {
        let text = "POST /echo?x=1 HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\nhello";
        let (found, len) = request(text).expect("valid").expect("whole");
        assert_eq!(&text[len..], "hello");
        assert_eq!((found.method.as_str(), found.path.as_str()), ("POST", "/echo"));
        assert_eq!(found.content_length, Some(5));
        assert!(found.keep_alive && found.expects_continue);
    }

    #[test]
    fn connections_end_as_the_client_wants() {
        for (head, keep) in [
            ("GET / HTTP/1.0\r\n\r\n", false),
            ("GET / HTTP/1.0\r\nconnection: Keep-Alive\r\n\r\n", true),
            ("GET / HTTP/1.1\r\n\r\n", true),
            ("GET / HTTP/1.1\r\nConnection: foo, CLOSE\r\n\r\n", false),
        ] {
            assert_eq!(request(head).expect("valid").expect("whole").0.keep_alive, keep, "{head}");
        }
    }

    #[test]
    fn ambiguous_and_broken_heads_are_refused() {
        for (head, error) in [
            ("GET / HTTP/2.0\r\n\r\n", HeadError::Version),
            ("GET /\r\n\r\n", HeadError::Malformed),
            ("GET  / HTTP/1.1\r\n\r\n", HeadError::Malformed),
            ("GET example.org HTTP/1.1\r\n\r\n", HeadError::Malformed),
            ("G(T / HTTP/1.1\r\n\r\n", HeadError::Malformed),
            ("GET / HTTP/1.1\r\nContent-Length : 5\r\n\r\n", HeadError::Malformed),
            (
                "GET / HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
                HeadError::Malformed,
            ),
            ("GET / HTTP/1.1\r\nContent-Length: +5\r\n\r\n", HeadError::Malformed),
            (
                "GET / HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n",
                HeadError::Malformed,
            ),
            ("GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", HeadError::Coding),
            ("GET / HTTP/1.1\r\na: b\r\n folded\r\n\r\n", HeadError::Malformed),
            ("GET / HTTP/1.1\r\na: b\rc\r\n\r\n", HeadError::Malformed),
            ("\r\n\r\n", HeadError::Malformed),
        ] {
            assert_eq!(request(head), Err(error), "{head}");
        }
        let long = format!("GET /{} HTTP/1.1\r\n\r\n", "a".repeat(MAX_HEAD));
        assert_eq!(request(&long), Err(HeadError::TooLong));
    }

    proptest! {
        /// Whatever arrives, in whatever pieces, the answer for a stream does not depend on how
        /// much of it came behind the head, and nothing but the head is consumed.
        #[test]
        fn any_bytes_have_one_meaning(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse(&bytes);
        }

        #[test]
        fn a_head_means_the_same_in_pieces(
            path in "/[a-z0-9/]{0,40}",
            length in prop::option::of(any::<u64>()),
            close in any::<bool>(),
            tail in prop::collection::vec(any::<u8>(), 0..50),
        ) {
            let mut text = format!("PUT {path} HTTP/1.1\r\nX-Y:  z \r\n");
            if let Some(length) = length {
                text += &format!("cOntent-length:{length}\r\n");
            }
            if close {
                text += "Connection: close\r\n";
            }
            text += "\r\n";
            let mut bytes = text.clone().into_bytes();
            for cut in 0..bytes.len() {
                prop_assert_eq!(parse(&bytes[..cut]), Ok(None));
            }
            bytes.extend(tail);
            let (found, len) = parse(&bytes).expect("valid").expect("whole");
            prop_assert_eq!(len, text.len());
            prop_assert_eq!(found.path, path);
            prop_assert_eq!(found.content_length, length);
            prop_assert_eq!(found.keep_alive, !close);
        }
    }
}
