//! The control socket without VMs: descriptions, refusals, and clients that mean harm.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::process::Command;

use serde_json::{Value, json};

use crate::scene::{Scene, wait_until};
use crate::served::{Served, request};

fn daemon() -> (Scene, Served) {
    let scene = Scene::bare();
    let daemon = Served::start(&scene, &[]);
    (scene, daemon)
}

#[test]
fn the_description_is_served_and_each_path_takes_the_methods_it_describes_and_no_others() {
    let (_scene, daemon) = daemon();
    let described = daemon.get("/openapi.json");
    let file: Value = serde_json::from_str(include_str!("../../../docs/openapi.json")).unwrap();
    assert_eq!(described, file);
    for (path, item) in described["paths"].as_object().unwrap() {
        let real = path.replace("{id}", "nobody").replace("{name}", "nobody");
        let (status, head, _) = daemon.raw(&request("TRACE", &real, None));
        assert_eq!(status, 405, "{real}");
        let allow = head.lines().find_map(|l| l.strip_prefix("allow: ")).unwrap_or_else(|| panic!("{head}"));
        let mut allowed: Vec<_> = allow.split(',').map(str::to_lowercase).collect();
        // Whatever can be got can be asked about.
        allowed.retain(|method| method != "head");
        let mut methods: Vec<_> =
            item.as_object().unwrap().keys().filter(|k| *k != "parameters").cloned().collect();
        allowed.sort();
        methods.sort();
        assert_eq!(allowed, methods, "{path}");
    }
    let (status, code) = daemon.refused("GET", "/v2/vms", &json!({}));
    assert_eq!((status, code.as_str()), (404, "no_such_route"));
}

#[test]
fn what_is_asked_wrongly_is_refused_by_name() {
    let (_scene, daemon) = daemon();
    let vm = |more: Value| {
        let mut body = json!({"snapshot": "vm", "firecracker": "/bin/false"});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    };
    for (path, body, expected) in [
        ("/v1/vms", json!({}), (400, "bad_request")),
        ("/v1/vms", json!([1, 2]), (400, "bad_request")),
        ("/v1/vms", vm(json!({"surprise": 1})), (400, "bad_request")),
        ("/v1/vms", vm(json!({"policy": "zeros"})), (400, "bad_request")),
        ("/v1/vms", vm(json!({"snapshot": "../etc"})), (400, "usage")),
        ("/v1/vms", vm(json!({"id": "a b"})), (400, "usage")),
        ("/v1/vms", vm(json!({"console": "relative"})), (400, "usage")),
        ("/v1/vms", json!({"snapshot": "vm"}), (400, "usage")),
        ("/v1/vms", vm(json!({})), (404, "no_such_snapshot")),
        ("/v1/vms/nobody/standby", json!({"name": "x"}), (404, "no_such_vm")),
        ("/v1/vms/nobody/stop", json!({}), (404, "no_such_vm")),
        ("/v1/vms/nobody/detach", json!({}), (404, "no_such_vm")),
        ("/v1/standby", json!({"name": "x"}), (400, "usage")),
        ("/v1/standby", json!({"name": "x", "api_socket": "/nowhere"}), (502, "vmm")),
        ("/v1/standby", json!({"name": "x", "api_socket": "/nowhere", "level": 99}), (400, "usage")),
        ("/v1/listeners", json!({"snapshot": "vm", "socket": "/tmp/x"}), (404, "no_such_snapshot")),
        ("/v1/listeners", json!({"snapshot": "vm", "socket": "x"}), (400, "usage")),
    ] {
        let (status, code) = daemon.refused("POST", path, &body);
        assert_eq!((status, code.as_str()), expected, "{path} {body}");
    }
    for path in ["/v1/vms/nobody", "/v1/listeners/nobody", "/v1/snapshots/nobody"] {
        assert_eq!(daemon.refused("GET", path, &json!({})).0, 404, "{path}");
    }
    for path in ["/v1/vms/%ff", "/v1/listeners/%ff", "/v1/snapshots/%ff"] {
        let refused = daemon.refused("GET", path, &json!({}));
        assert_eq!(refused, (400, "bad_request".to_owned()), "{path}");
    }
    let vms = daemon.get("/v1/vms");
    let failed = vms["vms"].as_array().unwrap();
    assert!(failed.iter().all(|vm| vm["state"] == "failed"), "{vms}");
}

#[test]
fn snapshots_are_listed_and_shown_as_the_command_line_does() {
    let (scene, daemon) = daemon();
    std::fs::write(scene.path("memory"), vec![7; 1 << 20]).unwrap();
    scene.done("host", &["import", "small", "--memory", &scene.text("memory"), "--label", "a=b"]);
    assert_eq!(daemon.get("/v1/snapshots"), scene.done("host", &["ls"]));
    assert_eq!(daemon.get("/v1/snapshots/small"), scene.done("host", &["show", "small"]));
    assert!(daemon.metric("dormouse_store_requests_total{request=\"get\",result=\"ok\"}") > 0.0);
    assert!(daemon.metric("dormouse_store_read_bytes_total") > 0.0);
    let health = daemon.get("/v1/health");
    assert_eq!((&health["status"], &health["vms"]), (&json!("ok"), &json!(0)), "{health}");
}

#[test]
fn clients_that_mean_harm_disturb_nobody_else() {
    let (_scene, mut daemon) = daemon();
    // More than are taken at a time: they say half a head and no more, and are sent away after a while.
    let slow: Vec<_> = (0..300)
        .map(|_| {
            let mut stream = daemon.connect();
            stream.write_all(b"GET /v1/health HTTP/1.1\r\nX-Slow: ").unwrap();
            stream
        })
        .collect();
    for nonsense in [&b"\0\xff\xfe nonsense\r\n\r\n"[..], b"GET", b"", b"SSH-2.0-OpenSSH\r\n\r\n"] {
        let mut stream = daemon.connect();
        let _ = stream.write_all(nonsense);
    }
    assert_eq!(daemon.get("/v1/health")["status"], "ok");
    drop(slow);

    let (status, _, body) = daemon.raw(
        &[
            b"POST /v1/vms HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 999999999999\r\n\r\n"
                .to_vec(),
            vec![b' '; 1 << 20],
        ]
        .concat(),
    );
    let body: Value = serde_json::from_slice(&body).unwrap();
    assert_eq!((status, &body["error"]["code"]), (413, &json!("too_large")));
    // One that is announced, and does not come: nobody waits for it.
    let announced = b"POST /v1/vms HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 70000\r\n\r\n";
    let (status, _, body) = daemon.raw(announced);
    let body: Value = serde_json::from_slice(&body).unwrap();
    assert_eq!((status, &body["error"]["code"]), (413, &json!("too_large")));
    let head = format!("GET /v1/health HTTP/1.1\r\nHost: x\r\nX: {}\r\n\r\n", "a".repeat(1 << 20));
    assert_eq!(daemon.raw(head.as_bytes()).0, 431);
    // A body that never comes to its end.
    let mut stalled = daemon.connect();
    stalled
        .write_all(b"POST /v1/vms HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 9\r\n\r\n{")
        .unwrap();
    let mut answer = String::new();
    stalled.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 408") && answer.contains("too_slow"), "{answer}");

    assert_eq!(daemon.get("/v1/health")["status"], "ok");
    assert!(daemon.process.child().try_wait().unwrap().is_none());
}

#[test]
fn only_the_daemons_user_may_ask() {
    let (scene, daemon) = daemon();
    let mode = |path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&daemon.control), 0o600);
    assert_eq!(mode(&scene.path("run/dormouse")), 0o700);
    // Even where somebody opens the way to the socket.
    let script = format!(
        "use IO::Socket::UNIX; $SIG{{PIPE}} = 'IGNORE'; my $s = IO::Socket::UNIX->new(Peer => '{}') or die \"connect: $!\"; \
         print $s \"GET /v1/health HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n\"; print 'got ', length(<$s> // '');",
        daemon.control.display()
    );
    for directory in [scene.path(""), scene.path("run"), scene.path("run/dormouse")] {
        std::fs::set_permissions(directory, PermissionsExt::from_mode(0o755)).unwrap();
    }
    std::fs::set_permissions(&daemon.control, PermissionsExt::from_mode(0o666)).unwrap();
    let nobody = Command::new("setpriv")
        .args(["--reuid=65534", "--clear-groups", "perl", "-e", &script])
        .output()
        .ok()
        .filter(|_| rustix::process::geteuid().is_root());
    let Some(nobody) = nobody else {
        return dormouse_testkit::skipped!("asking as another user takes root, setpriv and perl");
    };
    let said =
        String::from_utf8_lossy(&nobody.stdout).into_owned() + &String::from_utf8_lossy(&nobody.stderr);
    assert!(said == "got 0", "{said}");
    wait_until("the refusal to be logged", || {
        daemon.logged().iter().any(|l| l["fields"]["why"].as_str().is_some_and(|w| w.contains("65534")))
    });
    assert_eq!(daemon.get("/v1/health")["status"], "ok");
}

#[test]
fn a_second_daemon_does_not_take_the_socket_and_a_stale_one_is_replaced() {
    let (scene, daemon) = daemon();
    let second = scene.dormouse("host", &["serve"]).output().unwrap();
    assert_eq!(second.status.code(), Some(1));
    let said: Value = serde_json::from_slice(&second.stdout).unwrap();
    assert_eq!(said["error"]["kind"], "socket", "{said}");
    assert_eq!(daemon.get("/v1/health")["status"], "ok");
    daemon.process.kill();
    assert!(scene.path("run/dormouse/control.sock").exists());
    let daemon = Served::start(&scene, &[]);
    assert_eq!(daemon.get("/v1/health")["status"], "ok");
}

/// Whoever may ask at the control socket may have any binary started, as the daemon's user.
#[test]
fn counts_are_read_at_an_address_that_does_nothing_else() {
    let scene = Scene::bare();
    let daemon = Served::start(&scene, &["--metrics", "127.0.0.1:0"]);
    let said: Value = serde_json::from_slice(&std::fs::read(scene.path("serve.out")).unwrap()).unwrap();
    let ask = |method: &str, path: &str| {
        let mut stream = TcpStream::connect(said["metrics"].as_str().unwrap()).unwrap();
        stream.write_all(&request(method, path, None)).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    };
    let counted = ask("GET", "/metrics");
    assert!(counted.starts_with("HTTP/1.1 200") && counted.contains("dormouse_vms"), "{counted}");
    for (method, path) in [("POST", "/v1/vms"), ("GET", "/v1/health"), ("POST", "/v1/vms/x/stop")] {
        let refused = ask(method, path);
        assert!(refused.starts_with("HTTP/1.1 404") && refused.contains("no_such_route"), "{refused}");
    }
    assert!(ask("POST", "/metrics").starts_with("HTTP/1.1 405"));
    assert_eq!(daemon.get("/v1/health")["status"], "ok");
}

#[test]
fn systemd_is_told_of_the_beginning_the_end_and_all_the_time_between() {
    let scene = Scene::bare();
    let notify = UnixDatagram::bind(scene.path("notify")).unwrap();
    let mut daemon = Served::start_with(&scene, &[], |command| {
        command.env("NOTIFY_SOCKET", scene.path("notify")).env("WATCHDOG_USEC", "300000");
    });
    let mut told = String::new();
    let mut hear = |part: &str| {
        while !told.contains(part) {
            let mut buffer = [0; 4096];
            let read = notify.recv(&mut buffer).unwrap();
            told += std::str::from_utf8(&buffer[..read]).unwrap();
        }
    };
    notify.set_read_timeout(Some(crate::scene::PATIENCE)).unwrap();
    hear("READY=1");
    hear("WATCHDOG=1");
    daemon.terminate();
    hear("STOPPING=1");
    assert!(daemon.process.end().status.success());
    assert!(UnixStream::connect(scene.path("run/dormouse/control.sock")).is_err());
}

/// Each of these closes all devices, on some versions of systemd with what VMs need among them.
#[test]
fn the_unit_leaves_vms_their_devices() {
    let text = include_str!("../../systemd/dormouse.service");
    for closing in ["ProtectClock=", "PrivateDevices=", "DevicePolicy=", "DeviceAllow="] {
        assert!(!text.lines().any(|line| line.starts_with(closing)), "{closing}");
    }
}

#[test]
fn the_unit_is_one_that_systemd_understands() {
    let unit = concat!(env!("CARGO_MANIFEST_DIR"), "/systemd/dormouse.service");
    let text = std::fs::read_to_string(unit).unwrap();
    let scene = Scene::bare();
    // The unit names where packages install the binary, which is not on the machine that tests it.
    let binary = env!("CARGO_BIN_EXE_dormouse");
    let copy = scene.path("dormouse.service");
    std::fs::write(&copy, text.replace("/usr/bin/dormouse", binary)).unwrap();
    let Ok(output) = Command::new("systemd-analyze").arg("verify").arg("--man=no").arg(&copy).output() else {
        return dormouse_testkit::skipped!("there is no systemd-analyze");
    };
    let said = String::from_utf8_lossy(&output.stderr);
    let ours = said.lines().filter(|line| line.contains("dormouse.service"));
    // Known from systemd 254 on, and only then is the store used that it is about.
    let ours: Vec<_> = ours.filter(|line| !line.contains("FileDescriptorStorePreserve")).collect();
    assert!(output.status.success() && ours.is_empty(), "{said}");
}
