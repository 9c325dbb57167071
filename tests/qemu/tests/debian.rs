//! Guests with kernels of their own, unmodified from their distribution. `cargo xtask test` gives
//! a short dose; `cargo xtask linux-soak` and `boot-soak` the full one.

use qemu_tests::{Listed, Platform, Random, dose};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};
use xtask::guest_shell::Shell;
use xtask::platform::End;
use xtask::{build, doses, guest_kernel, image_files, project};

const BOOT: Duration = Duration::from_secs(180);
const MINUTE: Duration = Duration::from_secs(60);
/// Longest time between two deaths. The shortest is none at all.
const PAUSE_MS: u64 = 400;
/// The kernel's log, without a line that one of the jobs causes, and two about processors that stood still:
/// those of an emulated machine do, when the host has other work.
const LOG: &str = "dmesg | grep -v -e drop_caches -e clocksource: -e hrtimer:";
/// Bytes of the file that is downloaded.
const FILE_BYTES: usize = 16 << 20;
/// Where QEMU's network has the host.
const HOST: &str = "10.0.2.2";

/// Whether Debian's packages can be had here; says so if not.
fn has_apt() -> bool {
    let has = project::has_program("apt-get") && project::has_program("dpkg-deb");
    if !has {
        eprintln!("SKIPPED: the kernel comes by apt, which is not here");
    }
    has
}

/// Debian's cloud kernel finds its processors, its network card behind `net0`, and a shell.
#[test]
#[ignore = "boots QEMU: run it by `cargo xtask test`"]
fn debian_boots_and_gets_an_address() {
    if !has_apt() {
        return;
    }
    let file = project::root().join("systems/debian.toml");
    let built = build::build(&file).expect("a valid system");
    let platform = Platform::boot_built(&built, |options| options);
    for said in ["init: 6.", "inet 10.0.2.", "init: ready"] {
        wait_line(&platform, said);
    }
    let lines = platform.lines();
    let of = |text: &str| lines.iter().any(|line| line.text.contains(text));
    assert!(of("2 processors"), "both vCPUs are up");
    assert!(!of("Call Trace"), "nothing went wrong in the kernel");
}

fn wait_line(platform: &Platform, said: &str) {
    platform.wait_for(said, BOOT, || {
        let lines = platform.lines();
        lines.iter().any(|l| l.from == "debian" && l.text.contains(said)).then_some(())
    });
}

#[test]
#[ignore = "boots QEMU: run it by `cargo xtask test`"]
fn debian_does_not_notice_deaths_of_its_drivers() {
    survives(End::Crash);
}

#[test]
#[ignore = "boots QEMU: run it by `cargo xtask test`"]
fn debian_does_not_notice_restarts_of_its_drivers() {
    survives(End::Restart);
}

/// The design's promise to guests: no error, no wrong byte, no lost connection and no line in
/// the kernel's log, however often and whenever the drivers of network card and disk end.
fn survives(how: End) {
    if !has_apt() {
        return;
    }
    let ends = dose(doses::KILLS, 10);
    let mut random = Random::new();
    let file = project::root().join("systems/linux-bench.toml");
    let built = build::build(&file).expect("a valid system");
    let platform = Platform::boot_built(&built, |options| options);
    let mut shell = platform.shell(0, BOOT);
    let _servers = start_jobs(&mut shell);
    // The first death may leave what stays for life, such as its record.
    platform.end("net0", how);
    platform.end("disk0", how);
    let (memory, before) = (memory(&platform), platform.domains());
    let (start, mut counts) = (Instant::now(), [0_u64; 2]);
    for _ in 0..ends {
        std::thread::sleep(Duration::from_millis(random.below(PAUSE_MS)));
        let victim = usize::from(random.below(2) == 1);
        counts[victim] += 1;
        platform.end(["net0", "disk0"][victim], how);
    }
    let took = start.elapsed().as_secs();
    let rounds = end_jobs(&mut shell);
    let after = platform.domains();
    assert_eq!(others(&before), others(&after), "only the drivers died");
    assert_eq!(self::memory(&platform), memory, "frames were leaked");
    let [net, disk] = counts;
    println!("{how:?}: {net} of net0, {disk} of disk0 in {took} s; rounds: {rounds}");
}

/// Bytes that are free, or charged to somebody: a guest may ask for more frames of its grant table.
fn memory(platform: &Platform) -> u64 {
    platform.free_bytes() + platform.domains().iter().map(|it| it.memory_bytes).sum::<u64>()
}

/// Everybody's lives but those of the two drivers.
fn others(domains: &[Listed]) -> Vec<(String, u64)> {
    let others = domains.iter().filter(|it| !["net0", "disk0"].contains(&it.name.as_str()));
    others.map(|domain| (domain.name.clone(), domain.incarnation)).collect()
}

/// Kernels and numbers of vCPUs, and the ways in which a guest's life ends; the last one is for good.
const KINDS: [(&str, u32); 6] = [
    ("debian", 4),
    ("debian-full", 1),
    ("debian", 2),
    ("debian-full", 4),
    ("debian", 1),
    ("debian-full", 2),
];
const ENDS: [&str; 4] = ["reboot", "axl shutdown", "poweroff", "axl destroy"];

/// Both kernels with any number of processors: each boot comes to a shell, each way to end it
/// works, and nothing is left behind.
#[test]
#[ignore = "boots QEMU: run it by `cargo xtask test`"]
fn debian_boots_and_ends_in_every_way() {
    if !has_apt() {
        return;
    }
    let boots = dose(doses::BOOTS, ENDS.len() as u64);
    let start = Instant::now();
    let mut done = 0;
    for (kernel, vcpus) in KINDS.iter().cycle() {
        if done >= boots {
            break;
        }
        done += boots_on_one_machine(kernel, *vcpus);
        println!("{done} boots in {} s; last {kernel} with {vcpus}", start.elapsed().as_secs());
    }
}

/// One boot for each way to end it.
fn boots_on_one_machine(kernel: &str, vcpus: u32) -> u64 {
    let file = project::root().join("systems/linux-bench.toml");
    let text = std::fs::read_to_string(file).expect("the system file");
    let text = text
        .replace("kernel = \"debian-full\"", &format!("kernel = \"{kernel}\""))
        .replace("ramdisk = \"debian-full-tools\"\n", "")
        .replace("vcpus = 2", &format!("vcpus = {vcpus}"));
    let platform = Platform::boot_text("linux-boots", &text);
    let mut before = None;
    for (life, how) in (1..).zip(ENDS) {
        let mut shell = platform.shell(0, BOOT);
        let said = shell.must("nproc; uname -r; ls /dev/xvda2", MINUTE).expect("a shell");
        assert!(said.starts_with(&format!("{vcpus}\n6.")), "{said}");
        let before = before.get_or_insert_with(|| memory(&platform));
        end_guest(&platform, &mut shell, how, life);
        if how == "axl destroy" {
            assert_eq!(memory(&platform), *before, "frames were leaked");
        }
    }
    ENDS.len() as u64
}

/// Ends life number `life` of the guest; unless it is the last one, the next one begins.
fn end_guest(platform: &Platform, shell: &mut Shell, how: &str, life: u64) {
    match how.strip_prefix("axl ") {
        Some(verb) => {
            let output = platform.axl(&[verb, "debian"]);
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        }
        // Its answer may not come.
        None => drop(shell.run(&format!("(sleep 0.3; {how}) >/dev/null &"), MINUTE)),
    }
    let guest = || platform.domains().into_iter().find(|it| it.name == "debian");
    platform.wait_for(&format!("the end of life {life} by {how}"), MINUTE, || match guest() {
        None => (how == "axl destroy").then_some(()),
        // It is listed until its last frame is free.
        Some(_) if how == "axl destroy" => None,
        Some(guest) if how == "reboot" => (guest.incarnation > life).then_some(()),
        Some(guest) => (!guest.is_alive()).then_some(()),
    });
    if !["reboot", "axl destroy"].contains(&how) {
        let output = platform.axl(&["restart", "debian"]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}

/// What the guest does meanwhile: a name, and a command that fails when anything was wrong.
fn jobs(ports: &Ports) -> Vec<(&'static str, String)> {
    let verify = "--minimal --verify=crc32c --verify_fatal=1 --thread --randrepeat=0";
    let sum = image_files::sha256(&image_files::pattern(FILE_BYTES));
    vec![
        (
            "direct",
            format!(
                "fio {verify} --name=direct --filename=/dev/xvda1 --size=32M --rw=randwrite \
                 --bsrange=4k-64k --direct=1 --ioengine=libaio --iodepth=16 --do_verify=1"
            ),
        ),
        (
            // Written through the page cache, and read again without what was in it.
            "buffered",
            format!(
                "files='{verify} --name=files --directory=/data --size=16M --rw=randwrite --bs=16k \
                 --ioengine=psync'; seed=$(date +%s); \
                 fio $files --randseed=$seed --fsync=64 --end_fsync=1 --do_verify=0 && \
                 echo 3 >/proc/sys/vm/drop_caches && fio $files --randseed=$seed --verify_only"
            ),
        ),
        ("to_host", format!("iperf3 -c {HOST} -p {} -t 15", ports.streams[0])),
        ("from_host", format!("iperf3 -c {HOST} -p {} -t 15 -R", ports.streams[1])),
        (
            "download",
            format!(
                "[ \"$(wget -q -O - http://{HOST}:{}/ | sha256sum)\" = '{sum}  -' ]",
                ports.files
            ),
        ),
        (
            "upload",
            format!(
                "dd if=/dev/urandom of=/tmp/sent bs=1M count=8 && \
                 [ \"$(nc {HOST} {} </tmp/sent)\" = \"$(sha256sum </tmp/sent | cut -c1-64)\" ]",
                ports.sums
            ),
        ),
    ]
}

/// Ports of the host that the guest talks to.
struct Ports {
    streams: [u16; 2],
    files: u16,
    sums: u16,
}

/// Programs that end with the test.
struct Servers(Vec<Child>);

impl Drop for Servers {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Starts all jobs, each again and again until `/tmp/stop` is there, and waits until each has
/// begun; then notes what the kernel has said so far.
fn start_jobs(shell: &mut Shell) -> Servers {
    let mut servers = Servers(Vec::new());
    let streams = [(); 2].map(|()| {
        let (child, port) = stream_server();
        servers.0.push(child);
        port
    });
    let ports = Ports { streams, files: serve(send_pattern), sums: serve(answer_with_sum) };
    let must = |shell: &mut Shell, command: &str| {
        shell.must(command, MINUTE).unwrap_or_else(|error| panic!("{error}"));
    };
    must(shell, "mkfs.ext4 -q /dev/xvda2 && mkdir /data && mount /dev/xvda2 /data");
    for (name, command) in jobs(&ports) {
        let script = format!(
            "cat >/tmp/{name}.sh <<'END'\n\
             touch /tmp/{name}.begun; rounds=0\n\
             while [ ! -e /tmp/stop ]; do\n\
                 {{ {command} ; }} >/tmp/{name}.out 2>&1 || {{ mv /tmp/{name}.out /tmp/{name}.failed; break; }}\n\
                 rounds=$((rounds + 1))\n\
             done\n\
             echo $rounds >/tmp/{name}.rounds\n\
             END\n\
             sh /tmp/{name}.sh >/dev/null &"
        );
        must(shell, &script);
    }
    must(
        shell,
        &format!(
            "while [ $(ls /tmp/*.begun | wc -l) -lt 6 ]; do sleep 1; done; {LOG} >/tmp/before"
        ),
    );
    servers
}

/// Ends the jobs and looks for anything that went wrong. Returns how often each was done.
fn end_jobs(shell: &mut Shell) -> String {
    let mut must =
        |command: &str| shell.must(command, 5 * MINUTE).unwrap_or_else(|error| panic!("{error}"));
    must(
        "touch /tmp/stop; while [ $(ls /tmp/*.rounds 2>/dev/null | wc -l) -lt 6 ]; do sleep 1; done",
    );
    assert_eq!(must("for log in /tmp/*.failed; do [ ! -e $log ] || tail -n 20 $log; done"), "");
    assert_eq!(
        must(&format!("{LOG} >/tmp/after; cmp /tmp/before /tmp/after || dmesg | tail -n 20")),
        ""
    );
    let errors =
        "cd /sys/class/net/eth0/statistics && cat *_errors *_dropped | grep -v '^0$' || true";
    assert_eq!(must(errors), "");
    assert_eq!(
        must(
            "umount /data && e2fsck -f -n /dev/xvda2 2>/dev/null | grep -c -i -e fix -e error || true"
        ),
        "0"
    );
    let rounds = must("cd /tmp; for job in *.rounds; do echo ${job%.rounds} $(cat $job); done");
    rounds.replace('\n', ", ")
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
fn serve(client: fn(TcpStream) -> std::io::Result<()>) -> u16 {
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
fn send_pattern(mut stream: TcpStream) -> std::io::Result<()> {
    let mut request = [0; 1024];
    let _ = stream.read(&mut request)?;
    let body = image_files::pattern(FILE_BYTES);
    write!(stream, "HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n", body.len())?;
    stream.write_all(&body)
}

/// Answers all that comes with its sum.
fn answer_with_sum(mut stream: TcpStream) -> std::io::Result<()> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes)?;
    writeln!(stream, "{}", image_files::sha256(&bytes))
}
