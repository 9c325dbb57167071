//! One HTTP connection, over any byte stream: bytes in, bytes out, no waiting.
//!
//! ```text
//!          head complete                     answer sent, body read
//!   Head ────────────────▶ Answer ─────────────────────────────────▶ Head    keep-alive
//!    │ refused               │ close wanted
//!    └──────▶ Answer ────────┴──▶ Closing: what still arrives is thrown away
//! ```
//!
//! Nothing is buffered but a head, a page, and up to [`ECHO_BYTES`] of an echo: a client that does
//! not read is not read from either.

use crate::generator;
use crate::page::{self, Status};
use crate::request::{self, HeadError, Request};
use crate::shelf::{Reader, Shelf, State as ShelfState};
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::cell::RefCell;

/// Bytes of an echo that are under way inside the server.
pub const ECHO_BYTES: usize = 32 * 1024;
/// A body that nobody wants is read to its end up to this size, to keep the connection.
const SKIPPED_BYTES: u64 = 64 * 1024;

/// What the server tells about.
pub trait Facts {
    /// As of now.
    fn status(&self) -> Status;

    /// The files on the disk, if there is a disk.
    fn shelf(&self) -> Option<&RefCell<Shelf>> {
        None
    }
}

#[derive(Debug)]
enum Body {
    /// The head was all, or its text is with the head.
    None,
    /// Bytes `at..end` of the generator's stream.
    Generated { at: u64, end: u64 },
    /// What the client still has to send, and what it sent.
    Echo { unread: u64, held: Vec<u8>, taken: usize },
    /// A file of the disk.
    File(Reader),
}

#[derive(Debug)]
enum State {
    Head(Vec<u8>),
    Answer,
    Closing,
    /// An answer cannot be finished: the client must not take it for a whole one.
    Broken,
}

/// A connection.
#[derive(Debug)]
pub struct Connection {
    state: State,
    /// Head of the answer, and a short body, as far as it is not yet sent.
    front: Vec<u8>,
    front_sent: usize,
    body: Body,
    /// Bytes of the request's body to throw away.
    skip: u64,
    keep_alive: bool,
    /// Requests answered since the connection began.
    pub requests: u64,
}

impl Default for Connection {
    fn default() -> Self {
        Self::new()
    }
}

impl Connection {
    /// A connection on which nothing has happened.
    #[must_use]
    pub fn new() -> Self {
        Self {
            state: State::Head(Vec::new()),
            front: Vec::new(),
            front_sent: 0,
            body: Body::None,
            skip: 0,
            keep_alive: true,
            requests: 0,
        }
    }

    /// Whether the server wants to close; everything it has to say was handed out.
    #[must_use]
    pub fn is_closing(&self) -> bool {
        matches!(self.state, State::Closing)
    }

    /// Whether the answer under way cannot be finished. The connection is to be reset.
    #[must_use]
    pub fn is_broken(&self) -> bool {
        matches!(self.state, State::Broken)
    }

    /// Whether the connection is between two requests.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        matches!(&self.state, State::Head(head) if head.is_empty())
    }

    /// Whether the answer under way can be finished without more from the client.
    #[must_use]
    pub fn has_answer(&self) -> bool {
        let starved = match &self.body {
            Body::Echo { unread, held, taken } => *unread != 0 && *taken == held.len(),
            _ => false,
        };
        matches!(self.state, State::Answer) && (self.front_sent < self.front.len() || !starved)
    }

    /// Takes bytes from the client; returns how many it took. It takes none while it has no room.
    pub fn input(&mut self, bytes: &[u8], facts: &impl Facts) -> usize {
        if self.skip != 0 {
            let skipped = usize::try_from(self.skip).map_or(bytes.len(), |n| n.min(bytes.len()));
            self.skip -= skipped as u64;
            self.finish_if_done();
            return skipped;
        }
        match &mut self.state {
            State::Closing | State::Broken => bytes.len(),
            State::Head(_) => self.input_head(bytes, facts),
            State::Answer => self.input_body(bytes),
        }
    }

    fn input_head(&mut self, bytes: &[u8], facts: &impl Facts) -> usize {
        let State::Head(head) = &mut self.state else { return 0 };
        // Empty lines before a request line are ignored (RFC 9112, section 2.2).
        let blank = if head.is_empty() {
            bytes.iter().take_while(|b| matches!(b, b'\r' | b'\n')).count()
        } else {
            0
        };
        let before = head.len();
        let room = (request::MAX_HEAD - before).min(bytes.len() - blank);
        head.extend_from_slice(&bytes[blank..blank + room]);
        match request::parse(head) {
            Ok(None) => blank + room,
            Ok(Some((found, len))) => {
                self.answer(&found, facts);
                blank + len - before
            }
            Err(error) => {
                self.refuse(error);
                blank + room
            }
        }
    }

    fn input_body(&mut self, bytes: &[u8]) -> usize {
        let Body::Echo { unread, held, taken } = &mut self.body else { return 0 };
        if *taken == held.len() {
            held.clear();
            *taken = 0;
        }
        let wanted = usize::try_from(*unread).unwrap_or(usize::MAX);
        let count = wanted.min(bytes.len()).min(ECHO_BYTES - held.len());
        held.extend_from_slice(&bytes[..count]);
        *unread -= count as u64;
        count
    }

    /// Fills `buffer` for the client; returns how many bytes it wrote.
    pub fn output(&mut self, buffer: &mut [u8]) -> usize {
        let front = &self.front[self.front_sent..];
        let mut len = front.len().min(buffer.len());
        buffer[..len].copy_from_slice(&front[..len]);
        self.front_sent += len;
        if self.front_sent == self.front.len() {
            len += self.output_body(len, buffer);
        }
        self.finish_if_done();
        len
    }

    fn output_body(&mut self, from: usize, buffer: &mut [u8]) -> usize {
        let buffer = &mut buffer[from..];
        match &mut self.body {
            Body::None => 0,
            Body::Generated { at, end } => {
                let left = usize::try_from(*end - *at).unwrap_or(usize::MAX);
                let len = left.min(buffer.len());
                generator::fill(*at, &mut buffer[..len]);
                *at += len as u64;
                len
            }
            Body::Echo { held, taken, .. } => {
                let rest = &held[*taken..];
                let len = rest.len().min(buffer.len());
                buffer[..len].copy_from_slice(&rest[..len]);
                *taken += len;
                len
            }
            Body::File(reader) => {
                let len = reader.read(buffer);
                if reader.left() != 0 && reader.has_failed() {
                    self.state = State::Broken;
                }
                len
            }
        }
    }

    fn finish_if_done(&mut self) {
        let body_done = match &self.body {
            Body::None => true,
            Body::Generated { at, end } => at == end,
            Body::Echo { unread, held, taken } => *unread == 0 && *taken == held.len(),
            Body::File(reader) => reader.left() == 0,
        };
        let sent = self.front_sent == self.front.len() && body_done;
        if !matches!(self.state, State::Answer) || !sent || self.skip != 0 {
            return;
        }
        self.requests += 1;
        self.front = Vec::new();
        self.front_sent = 0;
        self.body = Body::None;
        self.state = if self.keep_alive { State::Head(Vec::new()) } else { State::Closing };
    }

    fn refuse(&mut self, error: HeadError) {
        self.keep_alive = false;
        self.text(
            error.status(),
            "",
            "text/plain",
            "this is not a request that can be answered\n",
            true,
        );
    }

    fn answer(&mut self, request: &Request, facts: &impl Facts) {
        self.keep_alive = request.keep_alive;
        if let ("POST" | "PUT", "/echo") = (request.method.as_str(), request.path.as_str()) {
            return self.echo(request);
        }
        self.skip_body(request);
        let with_body = request.method != "HEAD";
        if request.path == "/echo" {
            return self.text(
                405,
                "Allow: POST, PUT\r\n",
                "text/plain",
                "send a body with POST\n",
                with_body,
            );
        }
        let known = matches!(request.path.as_str(), "/" | "/status.json" | "/healthz")
            || request.path.starts_with("/bytes/")
            || (request.path.starts_with("/disk/") && facts.shelf().is_some());
        if known && !matches!(request.method.as_str(), "GET" | "HEAD") {
            return self.text(
                405,
                "Allow: GET, HEAD\r\n",
                "text/plain",
                "only GET and HEAD\n",
                true,
            );
        }
        let html = "text/html; charset=utf-8";
        let fresh = "Cache-Control: no-store\r\n";
        match request.path.as_str() {
            "/" => self.text(200, fresh, html, &page::html(&facts.status()), with_body),
            "/status.json" => {
                let body = page::json(&facts.status());
                self.text(200, fresh, "application/json", &body, with_body);
            }
            "/healthz" => self.text(200, fresh, "text/plain", "ok\n", with_body),
            path => match (path.strip_prefix("/bytes/"), path.strip_prefix("/disk/")) {
                (Some(number), _) => self.bytes(number, with_body),
                (None, Some(name)) => self.file(name, facts.shelf(), with_body),
                (None, None) => self.nothing(with_body),
            },
        }
    }

    /// Decides what becomes of a body that no answer needs.
    fn skip_body(&mut self, request: &Request) {
        let length = request.content_length.unwrap_or(0);
        if length > SKIPPED_BYTES || (length != 0 && request.expects_continue) {
            self.keep_alive = false; // Whatever is on its way is thrown away after the answer.
        } else {
            self.skip = length;
        }
    }

    fn nothing(&mut self, with_body: bool) {
        self.text(404, "", "text/plain", "there is nothing here\n", with_body);
    }

    /// A file of the disk, or the list of them.
    fn file(&mut self, name: &str, shelf: Option<&RefCell<Shelf>>, with_body: bool) {
        let Some(shelf) = shelf else { return self.nothing(with_body) };
        let mut shelf = shelf.borrow_mut();
        match shelf.state() {
            ShelfState::Ready => {}
            ShelfState::Opening => {
                let later = "Retry-After: 1\r\n";
                return self.text(
                    503,
                    later,
                    "text/plain",
                    "the disk is being opened\n",
                    with_body,
                );
            }
            ShelfState::Failed(error) => {
                return self.text(503, "", "text/plain", &format!("{error}\n"), with_body);
            }
        }
        if name.is_empty() {
            let list = page::list(shelf.files());
            return self.text(200, "", "text/html; charset=utf-8", &list, with_body);
        }
        let Some(reader) = shelf.open(name) else { return self.nothing(with_body) };
        self.head(200, "", content_type(name), reader.left());
        if with_body {
            self.body = Body::File(reader);
        }
    }

    fn bytes(&mut self, number: &str, with_body: bool) {
        let digits = !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit());
        match number.parse::<u64>() {
            Ok(end) if digits => {
                self.head(200, "", "application/octet-stream", end);
                if with_body {
                    self.body = Body::Generated { at: 0, end };
                }
            }
            _ => self.text(400, "", "text/plain", "write /bytes/N with a number N\n", with_body),
        }
    }

    fn echo(&mut self, request: &Request) {
        let Some(unread) = request.content_length else {
            self.keep_alive = false; // Without a length nobody knows where the body ends.
            return self.text(411, "", "text/plain", "Content-Length is needed\n", true);
        };
        self.head(200, "", "application/octet-stream", unread);
        if request.expects_continue && unread != 0 {
            self.front.splice(0..0, *b"HTTP/1.1 100 Continue\r\n\r\n");
        }
        let room = usize::try_from(unread).unwrap_or(usize::MAX).min(ECHO_BYTES);
        self.body = Body::Echo { unread, held: Vec::with_capacity(room), taken: 0 };
    }

    fn text(&mut self, status: u16, extra: &str, kind: &str, body: &str, with_body: bool) {
        self.head(status, extra, kind, body.len() as u64);
        if with_body {
            self.front.extend_from_slice(body.as_bytes());
        }
    }

    fn head(&mut self, status: u16, extra: &str, kind: &str, length: u64) {
        let connection = if self.keep_alive { "keep-alive" } else { "close" };
        let reason = reason(status);
        let head: String = format!(
            "HTTP/1.1 {status} {reason}\r\nServer: axolotl-demo\r\nContent-Type: {kind}\r\n\
             Content-Length: {length}\r\n{extra}Connection: {connection}\r\n\r\n"
        );
        self.front = head.into_bytes();
        self.front_sent = 0;
        self.body = Body::None;
        self.state = State::Answer;
    }
}

/// By the end of the name.
fn content_type(name: &str) -> &'static str {
    match name.rsplit_once('.').map_or("", |(_, end)| end) {
        "html" => "text/html; charset=utf-8",
        "txt" | "md" => "text/plain; charset=utf-8",
        "css" => "text/css",
        "js" => "text/javascript",
        "json" => "application/json",
        "svg" => "image/svg+xml",
        "png" => "image/png",
        "jpg" | "jpeg" => "image/jpeg",
        _ if name == "SHA256SUMS" => "text/plain; charset=utf-8",
        _ => "application/octet-stream",
    }
}

fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        400 => "Bad Request",
        404 => "Not Found",
        405 => "Method Not Allowed",
        411 => "Length Required",
        431 => "Request Header Fields Too Large",
        501 => "Not Implemented",
        503 => "Service Unavailable",
        505 => "HTTP Version Not Supported",
        _ => "Error",
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::shelf::tests::{Memory, content, pages};
    use proptest::prelude::*;

    pub(crate) struct Fixed;

    impl Facts for Fixed {
        fn status(&self) -> Status {
            Status { name: "demo".into(), ..Status::default() }
        }
    }

    /// Runs `input` through a connection in pieces of sizes `cuts`, and returns what came out.
    fn exchange(input: &[u8], cuts: &[usize]) -> (Vec<u8>, Connection) {
        let mut connection = Connection::new();
        let (mut out, mut at, mut idle) = (Vec::new(), 0, 0);
        for cut in cuts.iter().copied().cycle() {
            let end = (at + cut).min(input.len());
            let taken = connection.input(&input[at..end], &Fixed);
            assert!(taken <= end - at, "takes only what is there");
            at += taken;
            let mut buffer = vec![0; cut];
            let len = connection.output(&mut buffer);
            out.extend_from_slice(&buffer[..len]);
            idle = if taken == 0 && len == 0 { idle + 1 } else { 0 };
            if idle > cuts.len() + 1 {
                break;
            }
        }
        (out, connection)
    }

    fn whole(input: &str) -> String {
        String::from_utf8(exchange(input.as_bytes(), &[100_000]).0).expect("text")
    }

    #[test]
    fn the_table_of_answers() {
        for (request, start) in [
            ("GET / HTTP/1.1\r\n\r\n", "HTTP/1.1 200 OK"),
            ("GET /status.json HTTP/1.1\r\n\r\n", "HTTP/1.1 200 OK"),
            ("GET /healthz?x HTTP/1.1\r\n\r\n", "HTTP/1.1 200 OK"),
            ("GET /nothing HTTP/1.1\r\n\r\n", "HTTP/1.1 404 "),
            ("POST / HTTP/1.1\r\nContent-Length: 0\r\n\r\n", "HTTP/1.1 405 "),
            ("GET /echo HTTP/1.1\r\n\r\n", "HTTP/1.1 405 "),
            ("GET /bytes/ HTTP/1.1\r\n\r\n", "HTTP/1.1 400 "),
            ("GET /bytes/-1 HTTP/1.1\r\n\r\n", "HTTP/1.1 400 "),
            ("GET /bytes/99999999999999999999 HTTP/1.1\r\n\r\n", "HTTP/1.1 400 "),
            ("POST /echo HTTP/1.1\r\n\r\n", "HTTP/1.1 411 "),
            ("rubbish\r\n\r\n", "HTTP/1.1 400 "),
            ("GET / HTTP/3.0\r\n\r\n", "HTTP/1.1 505 "),
        ] {
            let answer = whole(request);
            assert!(answer.starts_with(start), "{request}: {answer}");
        }
    }

    /// Facts with a disk.
    struct WithDisk(RefCell<Shelf>);

    impl Facts for WithDisk {
        fn status(&self) -> Status {
            Status::default()
        }

        fn shelf(&self) -> Option<&RefCell<Shelf>> {
            Some(&self.0)
        }
    }

    /// The answer to one request, and whether the connection is broken.
    fn from_disk(facts: &WithDisk, disk: &mut Memory, request: &str) -> (Vec<u8>, bool) {
        let mut connection = Connection::new();
        assert_eq!(connection.input(request.as_bytes(), facts), request.len());
        let (mut out, mut buffer) = (Vec::new(), vec![0; 9999]);
        for _ in 0..2000 {
            facts.0.borrow_mut().poll(disk);
            let len = connection.output(&mut buffer);
            out.extend_from_slice(&buffer[..len]);
        }
        (out, connection.is_broken())
    }

    #[test]
    fn files_come_from_the_disk_with_their_length_and_type() {
        let files = [("big.bin", content(1 << 20)), ("a.txt", b"hello".to_vec())];
        let mut disk = Memory::new(&files, 512);
        let facts = WithDisk(RefCell::new(Shelf::new(pages(48))));
        let mut get = |path: &str| {
            let (out, broken) = from_disk(&facts, &mut disk, &format!("{path} HTTP/1.1\r\n\r\n"));
            assert!(!broken);
            let end = out.windows(4).position(|w| w == b"\r\n\r\n").expect("a head") + 4;
            (String::from_utf8_lossy(&out[..end]).into_owned(), out[end..].to_vec())
        };
        assert!(get("GET /disk/").0.starts_with("HTTP/1.1 503 "), "not yet");
        let (head, body) = get("GET /disk/");
        assert!(head.starts_with("HTTP/1.1 200 "));
        assert!(String::from_utf8_lossy(&body).contains("href=\"/disk/big.bin\""));
        let (head, body) = get("GET /disk/big.bin");
        assert!(head.contains("Content-Length: 1048576\r\n") && head.contains("octet-stream"));
        assert!(body == content(1 << 20));
        let (head, body) = get("HEAD /disk/a.txt");
        assert!(head.contains("Content-Length: 5\r\n") && head.contains("text/plain"));
        assert!(body.is_empty());
        assert!(get("GET /disk/b.txt").0.starts_with("HTTP/1.1 404 "));
        assert!(get("POST /disk/a.txt").0.starts_with("HTTP/1.1 405 "));
        assert!(whole("GET /disk/ HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 404 "), "no disk");
    }

    #[test]
    fn an_answer_that_the_disk_cuts_short_breaks_the_connection() {
        let mut disk = Memory::new(&[("big.bin", content(1 << 20))], 512);
        let facts = WithDisk(RefCell::new(Shelf::new(pages(48))));
        for _ in 0..100 {
            facts.0.borrow_mut().poll(&mut disk);
        }
        disk.bad = 1000;
        let (out, broken) = from_disk(&facts, &mut disk, "GET /disk/big.bin HTTP/1.1\r\n\r\n");
        assert!(broken && out.len() < 1 << 20);
    }

    #[test]
    fn a_head_request_gets_the_length_and_no_body() {
        let answer = whole("HEAD /bytes/12345 HTTP/1.1\r\n\r\n");
        assert!(answer.contains("Content-Length: 12345\r\n") && answer.ends_with("\r\n\r\n"));
    }

    #[test]
    fn after_a_refusal_the_connection_closes_and_swallows_the_rest() {
        let (out, connection) = exchange(b"rubbish\r\n\r\nGET / HTTP/1.1\r\n\r\n", &[5]);
        assert!(connection.is_closing());
        assert_eq!(String::from_utf8_lossy(&out).matches("HTTP/1.1").count(), 1);
    }

    #[test]
    fn a_waiting_client_is_told_to_go_on() {
        let head = "POST /echo HTTP/1.1\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n";
        let mut connection = Connection::new();
        assert_eq!(connection.input(head.as_bytes(), &Fixed), head.len());
        let mut buffer = [0; 500];
        let len = connection.output(&mut buffer);
        assert!(buffer[..len].starts_with(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200"));
        assert!(!connection.has_answer(), "the client's turn");
    }

    #[test]
    fn an_unwanted_body_does_not_become_a_request() {
        let input = "POST /nothing HTTP/1.1\r\nContent-Length: 18\r\n\r\nGET / HTTP/1.1\r\n\r\nGET /healthz HTTP/1.1\r\n\r\n";
        let answer = whole(input);
        assert_eq!(answer.matches("HTTP/1.1").count(), 2);
        assert!(answer.ends_with("ok\n"));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// However a stream of requests is cut, and however little room the answers have, all of
        /// them are answered, in order, with the right bytes.
        #[test]
        fn pipelined_requests_are_answered_in_order(
            requests in prop::collection::vec((any::<bool>(), 0_usize..3000), 1..6),
            cuts in prop::collection::vec(1_usize..700, 1..8),
        ) {
            let (mut input, mut bodies) = (Vec::new(), Vec::new());
            for (echo, len) in &requests {
                let mut body = vec![0; *len];
                generator::fill(0, &mut body);
                if *echo {
                    body.reverse();
                    input.extend(format!("POST /echo HTTP/1.1\r\nContent-Length: {len}\r\n\r\n").bytes());
                    input.extend(&body);
                } else {
                    input.extend(format!("\r\nGET /bytes/{len} HTTP/1.1\r\n\r\n").bytes());
                }
                bodies.push(body);
            }
            let (out, connection) = exchange(&input, &cuts);
            let mut rest = out.as_slice();
            for body in &bodies {
                let end = rest.windows(4).position(|w| w == b"\r\n\r\n").expect("a head") + 4;
                let head = core::str::from_utf8(&rest[..end]).expect("text");
                let length = format!("Content-Length: {}\r\n", body.len());
                prop_assert!(head.starts_with("HTTP/1.1 200 OK") && head.contains(&length));
                prop_assert!(rest[end..].starts_with(body));
                rest = &rest[end + body.len()..];
            }
            prop_assert!(rest.is_empty());
            prop_assert!(connection.is_idle());
            prop_assert_eq!(connection.requests, requests.len() as u64);
        }

        /// Nothing a client sends makes it fail, and it holds no more than it promises.
        #[test]
        fn no_client_is_too_strange(
            pieces in prop::collection::vec(
                prop_oneof![
                    Just(b"POST /echo HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n".to_vec()),
                    Just(b"GET /bytes/9 HTTP/1.1\r\n\r\n".to_vec()),
                    prop::collection::vec(any::<u8>(), 0..200),
                ],
                0..20,
            ),
        ) {
            let (_, connection) = exchange(&pieces.concat(), &[300, 7]);
            prop_assert!(connection.front.len() <= 64 * 1024);
        }
    }
}
