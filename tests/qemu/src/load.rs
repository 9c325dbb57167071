//! What a guest does while a test disturbs its surroundings: jobs in its shell that check what they do, and
//! servers on the host for them.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::process::{Child, Stdio};
use std::time::Duration;
use xtask::guest_shell::Shell;
use xtask::{guest_kernel, image_files, project};

const MINUTE: Duration = Duration::from_secs(60);
/// The kernel's log, without a line that one of the jobs causes, and two about processors that stood still:
/// those of an emulated machine do, when the host has other work.
const LOG: &str = "dmesg | grep -v -e drop_caches -e clocksource: -e hrtimer:";
/// Seconds that one round of a job may take: one that stands still fails by its name, before whoever waits
/// for its end gives up.
const ROUND: u32 = 200;
/// Where QEMU's network has the host.
pub const HOST: &str = "10.0.2.2";

/// Whether Debian's packages can be had here; says so if not.
#[must_use]
pub fn has_apt() -> bool {
    let has = project::has_program("apt-get") && project::has_program("dpkg-deb");
    if !has {
        eprintln!("SKIPPED: the kernel comes by apt, which is not here");
    }
    has
}

/// A job: a name, and a command that fails when anything was wrong.
pub type Job = (&'static str, String);

/// Runs a command that must succeed, and returns what it printed.
///
/// # Panics
/// When it does not.
pub fn must(shell: &mut Shell, command: &str) -> String {
    shell.must(command, 5 * MINUTE).unwrap_or_else(|error| panic!("{error}"))
}

/// Starts all jobs, each again and again until it is ended, and waits until each has begun; then
/// notes what the kernel has said so far.
pub fn start_jobs(shell: &mut Shell, jobs: &[Job]) {
    for (name, command) in jobs {
        let script = format!(
            "cat >/tmp/{name}.job <<'END'\n\
             {command}\n\
             END\n\
             cat >/tmp/{name}.sh <<'END'\n\
             touch /tmp/{name}.begun; rounds=0\n\
             while [ ! -e /tmp/{name}.stop ]; do\n\
                 timeout {ROUND} sh /tmp/{name}.job >/tmp/{name}.out 2>&1 || {{\n\
                     echo \"{name} ended with $?\" >>/tmp/{name}.out\n\
                     mv /tmp/{name}.out /tmp/{name}.failed; break\n\
                 }}\n\
                 rounds=$((rounds + 1))\n\
             done\n\
             echo $rounds >/tmp/{name}.rounds\n\
             END\n\
             sh /tmp/{name}.sh >/dev/null &"
        );
        must(shell, &script);
    }
    let begun = each(jobs, |name| format!("[ -e /tmp/{name}.begun ]"));
    must(
        shell,
        &format!("until {begun}; do sleep 1; done; [ -e /tmp/before ] || {LOG} >/tmp/before"),
    );
}

fn each(jobs: &[Job], of: impl Fn(&str) -> String) -> String {
    let parts: Vec<String> = jobs.iter().map(|(name, _)| of(name)).collect();
    parts.join(" && ")
}

/// Ends these jobs. Returns how often each was done.
///
/// # Panics
/// When one has failed.
pub fn end_jobs(shell: &mut Shell, jobs: &[Job]) -> String {
    let ended = each(jobs, |name| format!("[ -e /tmp/{name}.rounds ]"));
    let stop = each(jobs, |name| format!("touch /tmp/{name}.stop"));
    must(shell, &format!("{stop}; until {ended}; do sleep 1; done"));
    assert_eq!(
        must(shell, "for log in /tmp/*.failed; do [ ! -e $log ] || tail -n 20 $log; done"),
        ""
    );
    let rounds = each(jobs, |name| format!("echo {name} $(cat /tmp/{name}.rounds)"));
    must(shell, &rounds).replace('\n', ", ")
}

/// Nothing was said by the kernel since the jobs were started, and no frame was lost or damaged.
///
/// # Panics
/// When there was.
pub fn check_kernel(shell: &mut Shell) {
    let said = format!("{LOG} >/tmp/after; cmp /tmp/before /tmp/after || dmesg | tail -n 20");
    assert_eq!(must(shell, &said), "");
    // xen-netfront does not count in `rx_dropped`: what no protocol of the guest wants is there.
    let errors = "cd /sys/class/net/eth0/statistics && grep -v '^0$' *_errors tx_dropped || true";
    assert_eq!(must(shell, errors), "");
}

/// Servers on the host. They end with this.
pub struct Servers {
    /// Ports of iperf3, for one client each.
    pub streams: Vec<u16>,
    /// The port where a page is the pattern of [`Self::file_bytes`].
    pub files: u16,
    /// The port that answers all that comes with its SHA-256.
    pub sums: u16,
    /// Bytes of the page.
    pub file_bytes: usize,
    children: Vec<Child>,
}

impl Servers {
    /// Starts them, so many of iperf3.
    ///
    /// # Panics
    /// When they cannot be started.
    #[must_use]
    pub fn start(streams: usize, file_bytes: usize) -> Self {
        let files = serve(move |stream| send_pattern(stream, file_bytes));
        let (sums, children) = (serve(answer_with_sum), Vec::new());
        let mut servers = Self { streams: Vec::new(), files, sums, file_bytes, children };
        for _ in 0..streams {
            let (child, port) = stream_server();
            servers.children.push(child);
            servers.streams.push(port);
        }
        servers
    }

    /// Fetches the page.
    #[must_use]
    pub fn download(&self) -> Job {
        let url = format!("http://{HOST}:{}/", self.files);
        ("download", fetch(&url, &image_files::sha256(&image_files::pattern(self.file_bytes))))
    }

    /// Sends random bytes.
    #[must_use]
    pub fn upload(&self, mebibytes: usize) -> Job {
        ("upload", send(HOST, self.sums, mebibytes, "sent"))
    }
}

/// Fetches a page that must have this SHA-256.
#[must_use]
pub fn fetch(url: &str, sha256: &str) -> String {
    format!("[ \"$(wget -q -O - {url} | sha256sum)\" = '{sha256}  -' ]")
}

/// Sends random bytes, by way of a file of this name, to one who answers with their SHA-256.
#[must_use]
pub fn send(host: &str, port: u16, mebibytes: usize, file: &str) -> String {
    format!(
        "dd if=/dev/urandom of=/tmp/{file} bs=1M count={mebibytes} && \
         [ \"$(nc {host} {port} </tmp/{file} | cut -c1-64)\" = \"$(sha256sum </tmp/{file} | cut -c1-64)\" ]"
    )
}

/// Writes blocks all over a disk, many at a time, and reads them back.
#[must_use]
pub fn direct(disk: &str, size: &str) -> Job {
    let command = format!(
        "fio --minimal --verify=crc32c --verify_fatal=1 --thread --randrepeat=0 --name=direct \
         --filename={disk} --size={size} --rw=randwrite --bsrange=4k-64k --direct=1 \
         --ioengine=libaio --iodepth=16 --do_verify=1"
    );
    ("direct", command)
}

impl Drop for Servers {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// An iperf3 server on the host, and its port.
fn stream_server() -> (Child, u16) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
    let port = listener.local_addr().expect("bound").port();
    drop(listener);
    let mut command = guest_kernel::host_program("usr/bin/iperf3").expect("Debian's packages");
    command.args(["-s", "--bind", "127.0.0.1", "-p", &port.to_string()]);
    let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    (child.expect("iperf3 starts"), port)
}

/// Lets `client` have every connection to a new port, as long as the test's process lives.
fn serve(client: impl Fn(TcpStream) -> std::io::Result<()> + Copy + Send + 'static) -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
    let port = listener.local_addr().expect("bound").port();
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            // What became of it is for the guest to judge.
            std::thread::spawn(move || client(stream));
        }
    });
    port
}

/// Answers a request for a page with the pattern.
fn send_pattern(mut stream: TcpStream, bytes: usize) -> std::io::Result<()> {
    let mut request = [0; 1024];
    let _ = stream.read(&mut request)?;
    let body = image_files::pattern(bytes);
    write!(stream, "HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n", body.len())?;
    stream.write_all(&body)
}

/// Answers all that comes with its sum.
fn answer_with_sum(mut stream: TcpStream) -> std::io::Result<()> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes)?;
    writeln!(stream, "{}", image_files::sha256(&bytes))
}
