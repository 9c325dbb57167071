//! An HTTP client, just enough for the demo guest: one request on one connection.

use std::io::{BufRead, BufReader, Error, ErrorKind, Read, Result, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

/// A stream that ends with an error when the whole exchange takes longer than it may.
struct Limited {
    stream: TcpStream,
    deadline: Instant,
}

impl Read for Limited {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        self.stream.set_read_timeout(Some(left))?;
        self.stream.read(buffer)
    }
}

/// An answer whose body has not been read yet.
pub struct Answer {
    /// The status, such as 200.
    pub status: u16,
    /// `Content-Length`, when the server sent one.
    pub length: Option<u64>,
    body: BufReader<Limited>,
}

/// Sends `GET path` and reads the head of the answer. The limit holds for the body too.
///
/// # Errors
/// No connection, no HTTP, or the limit has passed.
pub fn get(server: SocketAddr, path: &str, limit: Duration) -> Result<Answer> {
    send(
        server,
        &format!("GET {path} HTTP/1.1\r\nHost: {server}\r\nConnection: close\r\n\r\n"),
        &[],
        limit,
    )
}

/// Sends `body` to `path` by `POST`.
///
/// # Errors
/// As [`get`].
pub fn post(server: SocketAddr, path: &str, body: &[u8], limit: Duration) -> Result<Answer> {
    let length = body.len();
    let head = format!(
        "POST {path} HTTP/1.1\r\nHost: {server}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
    );
    send(server, &head, body, limit)
}

fn send(server: SocketAddr, head: &str, body: &[u8], limit: Duration) -> Result<Answer> {
    let deadline = Instant::now() + limit;
    let mut stream = TcpStream::connect_timeout(&server, limit)?;
    stream.set_write_timeout(Some(limit))?;
    stream.write_all(head.as_bytes())?;
    // A server that echoes sends while we send: the body goes out on a thread of its own.
    if !body.is_empty() {
        let (mut sender, body) = (stream.try_clone()?, body.to_vec());
        std::thread::spawn(move || sender.write_all(&body));
    }
    let mut body = BufReader::with_capacity(1 << 16, Limited { stream, deadline });
    let (status, length) = head_of(&mut body)?;
    Ok(Answer { status, length, body })
}

fn head_of(reader: &mut impl BufRead) -> Result<(u16, Option<u64>)> {
    let status_line = head_line(reader)?;
    let status = status_line.split(' ').nth(1).and_then(|word| word.parse().ok());
    let status = status.filter(|_| status_line.starts_with("HTTP/1.")).ok_or_else(|| {
        Error::new(ErrorKind::InvalidData, format!("`{status_line}` is no HTTP status line"))
    })?;
    let mut length = None;
    loop {
        let line = head_line(reader)?;
        if line.is_empty() {
            return Ok((status, length));
        }
        if let Some((name, value)) = line.split_once(':')
            && name.eq_ignore_ascii_case("content-length")
        {
            length = value.trim().parse().ok();
        }
    }
}

fn head_line(reader: &mut impl BufRead) -> Result<String> {
    let mut line = String::new();
    if reader.take(8192).read_line(&mut line)? == 0 {
        return Err(ErrorKind::UnexpectedEof.into());
    }
    line.truncate(line.trim_end().len());
    Ok(line)
}

impl Answer {
    /// The whole body.
    ///
    /// # Errors
    /// The connection broke, ended early, or the limit has passed.
    pub fn body(mut self) -> Result<Vec<u8>> {
        let mut body = Vec::new();
        self.each_piece(|piece| body.extend_from_slice(piece))?;
        Ok(body)
    }

    /// Reads the body and passes its pieces on as they arrive; returns its bytes.
    ///
    /// # Errors
    /// As [`Answer::body`].
    pub fn each_piece(&mut self, mut piece: impl FnMut(&[u8])) -> Result<u64> {
        let mut total = 0;
        let end = self.length.unwrap_or(u64::MAX);
        while total < end {
            let bytes = self.body.fill_buf()?;
            if bytes.is_empty() {
                break;
            }
            let left = usize::try_from(end - total).unwrap_or(usize::MAX);
            let count = bytes.len().min(left);
            piece(&bytes[..count]);
            total += count as u64;
            self.body.consume(count);
        }
        match self.length {
            Some(length) if length != total => Err(Error::new(
                ErrorKind::UnexpectedEof,
                format!("the connection ended after {total} of {length} bytes"),
            )),
            _ => Ok(total),
        }
    }
}

/// How a download of `/bytes/N` went.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Download {
    /// Bytes that arrived.
    pub bytes: u64,
    /// How long it took.
    pub took: Duration,
    /// The longest time without a byte.
    pub longest_gap: Duration,
}

/// Downloads `/bytes/N` and compares every byte with what the demo guest shall send. `progress`
/// gets the bytes so far after each piece.
///
/// # Errors
/// The connection, the status, the length, or the first byte that differs.
pub fn download(
    server: SocketAddr,
    count: u64,
    limit: Duration,
    progress: impl FnMut(u64),
) -> Result<Download> {
    download_from(server, &format!("/bytes/{count}"), count, limit, progress)
}

/// The same for `path`, where the same bytes are.
///
/// # Errors
/// As [`download`].
pub fn download_from(
    server: SocketAddr,
    path: &str,
    count: u64,
    limit: Duration,
    mut progress: impl FnMut(u64),
) -> Result<Download> {
    let start = Instant::now();
    let mut answer = get(server, path, limit)?;
    if answer.status != 200 {
        return Err(Error::other(format!("status {}", answer.status)));
    }
    let (mut at, mut wrong) = (0, None);
    let (mut last, mut longest_gap) = (Instant::now(), Duration::ZERO);
    let bytes = answer.each_piece(|piece| {
        longest_gap = longest_gap.max(last.elapsed());
        last = Instant::now();
        wrong = wrong.or_else(|| first_difference(at, piece));
        at += piece.len() as u64;
        progress(at);
    })?;
    match wrong {
        Some(wrong) => Err(Error::new(ErrorKind::InvalidData, format!("byte {wrong} is wrong"))),
        None if bytes != count => Err(Error::new(
            ErrorKind::UnexpectedEof,
            format!("{bytes} bytes arrived instead of {count}"),
        )),
        None => Ok(Download { bytes, took: start.elapsed(), longest_gap }),
    }
}

/// Where `piece`, from byte `at` of the stream on, first differs from what it should be:
/// the output function of SplitMix64 (Steele, Lea and Flood, 2014), little-endian. Written apart from the guest's
/// own code, so that a mistake there shows here.
fn first_difference(at: u64, piece: &[u8]) -> Option<u64> {
    let (mut k, mut word) = (u64::MAX, [0; 8]);
    (at..).zip(piece).find_map(|(at, byte)| {
        if at / 8 != k {
            k = at / 8;
            word = stream_word(k).to_le_bytes();
        }
        let expected = word[(at % 8) as usize];
        (*byte != expected).then_some(at)
    })
}

fn stream_word(k: u64) -> u64 {
    let mut z = k.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    /// A server that answers one request with `answer`, whatever it is.
    fn server(answer: Vec<u8>) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("bound");
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("a client");
            let mut request = [0; 512];
            let _ = stream.read(&mut request);
            let _ = stream.write_all(&answer);
        });
        address
    }

    fn bytes_answer(length: usize, spoil: Option<usize>) -> Vec<u8> {
        let mut body: Vec<u8> =
            (0..).flat_map(|k| stream_word(k).to_le_bytes()).take(length).collect();
        if let Some(at) = spoil {
            body[at] ^= 1;
        }
        let mut answer =
            format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n").into_bytes();
        answer.extend(body);
        answer
    }

    const LIMIT: Duration = Duration::from_secs(5);

    #[test]
    fn a_right_download_is_accepted() {
        let result = download(server(bytes_answer(100_003, None)), 100_003, LIMIT, |_| ());
        assert_eq!(result.expect("right").bytes, 100_003);
    }

    #[test]
    fn one_wrong_bit_is_found() {
        let error = download(server(bytes_answer(100_003, Some(70_001))), 100_003, LIMIT, |_| ());
        assert!(error.expect_err("wrong").to_string().contains("byte 70001 "));
    }

    #[test]
    fn a_short_answer_is_an_error() {
        let mut answer = bytes_answer(1000, None);
        answer.truncate(900);
        let error = download(server(answer), 1000, LIMIT, |_| ()).expect_err("short");
        assert_eq!(error.kind(), ErrorKind::UnexpectedEof);
        let error = download(server(bytes_answer(10, None)), 11, LIMIT, |_| ()).expect_err("short");
        assert_eq!(error.kind(), ErrorKind::UnexpectedEof);
    }

    #[test]
    fn a_silent_server_does_not_hold_us() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("bound");
        let start = Instant::now();
        assert!(get(address, "/", Duration::from_millis(200)).is_err());
        assert!(start.elapsed() < Duration::from_secs(3));
    }
}
