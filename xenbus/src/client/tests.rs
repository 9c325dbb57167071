use super::*;
use proptest::prelude::*;

/// A store that sends, for each request it gets, the prepared bytes; some bytes at a time.
struct Script {
    grain: usize,
    requests: Vec<Message>,
    decoder: Decoder,
    answers: VecDeque<Vec<(MessageKind, Vec<u8>)>>,
    out: VecDeque<u8>,
}

impl Script {
    fn client(grain: usize, answers: &[&[(MessageKind, &[u8])]]) -> Client<Self> {
        let answers = answers
            .iter()
            .map(|list| list.iter().map(|(kind, bytes)| (*kind, bytes.to_vec())).collect())
            .collect();
        Client::new(Self {
            grain,
            requests: Vec::new(),
            decoder: Decoder::new(),
            answers,
            out: VecDeque::new(),
        })
    }
}

impl Transport for Script {
    fn send(&mut self, bytes: &[u8]) -> usize {
        let mut input = &bytes[..bytes.len().min(self.grain)];
        let sent = input.len();
        while let Some(request) = self.decoder.feed(&mut input).unwrap() {
            for (kind, payload) in self.answers.pop_front().unwrap_or_default() {
                let event = kind == MessageKind::WATCH_EVENT;
                let req_id = if event { 0 } else { request.req_id };
                let mut bytes = Vec::new();
                wire::encode(&mut bytes, kind, req_id, request.tx_id, &[&payload]).unwrap();
                self.out.extend(bytes);
            }
            self.requests.push(request);
        }
        sent
    }

    fn receive(&mut self, buffer: &mut [u8]) -> usize {
        let n = self.grain.min(buffer.len()).min(self.out.len());
        for (to, from) in buffer.iter_mut().zip(self.out.drain(..n)) {
            *to = from;
        }
        n
    }

    fn wait(&mut self) -> Result<(), Errno> {
        Err(Errno::EIO)
    }
}

const OK: (MessageKind, &[u8]) = (MessageKind::WATCH, b"OK\0");

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 4 } else { 64 }))]

    /// However the streams are cut, events around a reply are kept in order and the reply is found.
    #[test]
    fn events_may_surround_a_reply(grain in 1_usize..70) {
        let mut client = Script::client(grain, &[
            &[OK],
            &[
                (MessageKind::WATCH_EVENT, b"dev/a\0t\0"),
                (MessageKind::READ, b"value"),
                (MessageKind::WATCH_EVENT, b"dev/b\0t\0"),
                (MessageKind::WATCH_EVENT, b"dev/a\0t\0"),
            ],
        ]);
        client.watch("dev", "t").unwrap();
        prop_assert_eq!(client.read("x").unwrap(), b"value");
        let paths: Vec<String> =
            core::iter::from_fn(|| client.next_event()).map(|event| event.path).collect();
        // The second event at `a` is kept if the first one was given out in between: it was not.
        prop_assert!(paths == ["dev/a", "dev/b"] || paths == ["dev/a", "dev/b", "dev/a"]);
        prop_assert_eq!(&client.transport().requests[1].payload[..], b"x\0");
    }
}

#[test]
fn errors_come_back_as_errnos() {
    let mut client = Script::client(
        1000,
        &[&[(MessageKind::ERROR, b"EACCES\0")], &[(MessageKind::ERROR, b"EWHAT\0")]],
    );
    assert_eq!(client.read("x"), Err(Errno::EACCES));
    assert_eq!(client.read("x"), Err(Errno::EIO));
    assert!(!client.is_lost());
}

#[test]
fn a_reply_of_another_kind_ends_the_connection() {
    let mut client = Script::client(1000, &[&[(MessageKind::WRITE, b"OK\0")]]);
    assert_eq!(client.read("x"), Err(Errno::EIO));
    assert!(client.is_lost());
    assert_eq!(client.read("x"), Err(Errno::EIO));
    assert_eq!(client.transport().requests.len(), 1);
}

#[test]
fn a_silent_store_ends_the_connection_when_the_transport_gives_up() {
    let mut client = Script::client(1000, &[]);
    assert_eq!(client.read("x"), Err(Errno::EIO));
    assert!(client.is_lost());
}

/// A body that fails is not repeated, and its transaction is given up.
#[test]
fn a_failing_body_aborts() {
    let mut client = Script::client(
        1000,
        &[
            &[(MessageKind::TRANSACTION_START, b"7\0")],
            &[(MessageKind::ERROR, b"ENOENT\0")],
            &[(MessageKind::TRANSACTION_END, b"OK\0")],
        ],
    );
    let result = client.transaction(|nodes| nodes.read("x"));
    assert_eq!(result, Err(Errno::ENOENT));
    let last = client.transport().requests.pop().unwrap();
    assert_eq!((last.tx_id, &last.payload[..]), (7, &b"F\0"[..]));
}

#[test]
fn a_conflict_repeats_the_body() {
    let mut client = Script::client(
        1000,
        &[
            &[(MessageKind::TRANSACTION_START, b"7\0")],
            &[(MessageKind::ERROR, b"EAGAIN\0")],
            &[(MessageKind::TRANSACTION_START, b"8\0")],
            &[(MessageKind::TRANSACTION_END, b"OK\0")],
        ],
    );
    let mut runs = 0;
    client
        .transaction(|_| {
            runs += 1;
            Ok(())
        })
        .unwrap();
    assert_eq!(runs, 2);
}

/// Others cannot make a client hold events without limit.
#[test]
fn events_are_merged_when_they_pile_up() {
    let mut client = Script::client(1000, &[&[OK]]);
    client.watch("dev", "t").unwrap();
    for index in 0..3 * EVENTS_KEPT {
        client.keep_event(format!("dev/{index}\0t\0").as_bytes());
    }
    assert_eq!(client.events.len(), EVENTS_KEPT + 1);
    assert_eq!(client.events.back().unwrap().path, "dev");
}

#[test]
fn events_of_no_watch_are_dropped() {
    let mut client = Script::client(1000, &[&[OK]]);
    client.watch("dev", "t").unwrap();
    for payload in [&b"dev\0u\0"[..], b"device\0t\0", b"dev\0t", b"dev\0", b"\xff\0t\0"] {
        client.keep_event(payload);
    }
    assert_eq!(client.next_event(), None);
}

#[test]
fn long_directories_are_read_in_parts() {
    let mut client = Script::client(
        1000,
        &[
            &[(MessageKind::ERROR, b"E2BIG\0")],
            &[(MessageKind::DIRECTORY_PART, b"5\0one\0two\0")],
            &[(MessageKind::DIRECTORY_PART, b"6\0three\0")],
            &[(MessageKind::DIRECTORY_PART, b"6\0zero\0one\0")],
            &[(MessageKind::DIRECTORY_PART, b"6\0two\0\0")],
        ],
    );
    assert_eq!(client.directory("x").unwrap(), ["zero", "one", "two"]);
    let requests = &client.transport().requests;
    let offsets: Vec<&[u8]> = requests[1..].iter().map(|request| &request.payload[2..]).collect();
    assert_eq!(offsets, [&b"0\0"[..], b"8\0", b"0\0", b"9\0"]);
}
