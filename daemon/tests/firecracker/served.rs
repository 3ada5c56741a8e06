//! A running `dormouse serve`, asked over its control socket. Every answer is held against docs/openapi.json.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;

use serde_json::{Value, json};

use crate::scene::{Console, PATIENCE, Running, Scene, wait_until};
use crate::serve_uffd::parked;

/// A daemon on a scene's store. Killed if the test fails.
pub(crate) struct Served {
    pub(crate) process: Running,
    pub(crate) control: PathBuf,
    log: PathBuf,
    document: Value,
}

impl Served {
    /// Starts one with these options and waits until it says that it serves.
    pub(crate) fn start(scene: &Scene, options: &[&str]) -> Self {
        Self::start_with(scene, options, |_| ())
    }

    pub(crate) fn start_with(scene: &Scene, options: &[&str], set: impl FnOnce(&mut Command)) -> Self {
        let (out, log) = (scene.path("serve.out"), scene.path("serve.log"));
        let mut command = scene.dormouse("host", &[&["serve", "--log-format", "json"], options].concat());
        let appended = File::options().create(true).append(true).open(&log).unwrap();
        command.stdout(File::create(&out).unwrap()).stderr(appended);
        set(&mut command);
        let mut process = Running::start(command);
        let ready = || serde_json::from_slice::<Value>(&std::fs::read(&out).unwrap()).ok();
        wait_until("the daemon to serve", || {
            if let Some(status) = process.child().try_wait().unwrap() {
                panic!("{status}: {}", std::fs::read_to_string(&log).unwrap());
            }
            ready().is_some()
        });
        let control = ready().unwrap()["control"].as_str().unwrap().into();
        let document = serde_json::from_str(include_str!("../../../docs/openapi.json")).unwrap();
        Served { process, control, log, document }
    }

    /// What it logged: every line is a document.
    pub(crate) fn logged(&self) -> Vec<Value> {
        let text = std::fs::read_to_string(&self.log).unwrap();
        text.lines()
            .map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}")))
            .collect()
    }

    pub(crate) fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.control).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// Status, head and body of any request.
    pub(crate) fn raw(&self, request: &[u8]) -> (u16, String, Vec<u8>) {
        let mut stream = self.connect();
        // Whoever is refused early may find that the rest of what they say is not read.
        let _ = stream.write_all(request);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        let end = answer.windows(4).position(|w| w == b"\r\n\r\n").unwrap_or_else(|| {
            panic!("no answer: {}", String::from_utf8_lossy(&answer));
        });
        let head = String::from_utf8_lossy(&answer[..end]).into_owned();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        (status, head, answer[end + 4..].to_vec())
    }

    /// Asks, and holds both bodies against the description.
    pub(crate) fn ask(&self, method: &str, path: &str, body: Option<&Value>) -> (u16, Value) {
        let (status, _, bytes) = self.raw(&request(method, path, body));
        let answer: Value = serde_json::from_slice(&bytes)
            .unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&bytes)));
        self.check(method, path, body, status, &answer);
        (status, answer)
    }

    pub(crate) fn get(&self, path: &str) -> Value {
        let (status, answer) = self.ask("GET", path, None);
        assert_eq!(status, 200, "GET {path}: {answer}");
        answer
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> Value {
        let (status, answer) = self.ask("POST", path, Some(body));
        assert!(matches!(status, 200 | 201), "POST {path}: {answer}");
        answer
    }

    /// The code of a request that must fail.
    pub(crate) fn refused(&self, method: &str, path: &str, body: &Value) -> (u16, String) {
        let (status, answer) = self.ask(method, path, Some(body));
        assert!(status >= 400, "{method} {path} should have failed: {answer}");
        (status, answer["error"]["code"].as_str().unwrap().to_owned())
    }

    pub(crate) fn metrics(&self) -> String {
        let (status, _, body) = self.raw(&request("GET", "/metrics", None));
        assert_eq!(status, 200);
        String::from_utf8(body).unwrap()
    }

    /// The value of one metric, as the line begins.
    pub(crate) fn metric(&self, name: &str) -> f64 {
        let text = self.metrics();
        let line = text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("no {name} in {text}")).parse().unwrap()
    }

    fn check(&self, method: &str, path: &str, body: Option<&Value>, status: u16, answer: &Value) {
        let Some(operation) = self.operation(method, path) else {
            assert!(matches!(status, 404 | 405), "{method} {path} is answered and not described: {answer}");
            return self.valid(&json!({"$ref": "#/components/schemas/Error"}), answer, path);
        };
        let content = |of: &Value| of["content"]["application/json"]["schema"].clone();
        let responses = &operation["responses"];
        let described = responses.get(status.to_string()).unwrap_or_else(|| {
            assert!(status >= 400, "{method} {path}: {status} is not described");
            &responses["default"]
        });
        self.valid(&content(described), answer, path);
        if let Some(body) = body.filter(|_| status < 400) {
            self.valid(&content(&operation["requestBody"]), body, path);
        }
    }

    fn valid(&self, schema: &Value, instance: &Value, path: &str) {
        let mut schema = schema.clone();
        schema["components"] = self.document["components"].clone();
        let validator = jsonschema::validator_for(&schema).unwrap();
        let errors: Vec<_> =
            validator.iter_errors(instance).map(|e| format!("{}: {e}", e.instance_path())).collect();
        assert!(errors.is_empty(), "{path}: {errors:?} in {instance}");
    }

    /// The description of what answers `path`, which may have a query.
    fn operation(&self, method: &str, path: &str) -> Option<&Value> {
        let path = path.split('?').next().unwrap();
        let same = |template: &str| {
            let (a, b) = (template.split('/'), path.split('/'));
            a.clone().count() == b.clone().count() && a.zip(b).all(|(a, b)| a == b || a.starts_with('{'))
        };
        let paths = self.document["paths"].as_object().unwrap();
        let (_, item) = paths.iter().find(|(template, _)| same(template))?;
        item.get(method.to_lowercase())
    }

    /// Wakes `vm` and gives it with its console.
    pub(crate) fn wake(&self, scene: &Scene, id: &str, more: Value) -> (Value, Console) {
        let console = scene.path(&format!("{id}.console"));
        let mut request =
            json!({"id": id, "snapshot": "vm", "firecracker": scene.binary(), "console": console});
        request.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        (self.post("/v1/vms", &request), Console(console))
    }

    /// Asks it to end, as systemd does.
    pub(crate) fn terminate(&mut self) {
        kill("-TERM", u64::from(self.process.child().id()));
    }
}

/// The bytes of a request, after which the connection is closed.
pub(crate) fn request(method: &str, path: &str, body: Option<&Value>) -> Vec<u8> {
    let body = body.map(Value::to_string).unwrap_or_default();
    let length = body.len();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n"
    );
    (head + &body).into_bytes()
}

pub(crate) fn kill(signal: &str, pid: u64) {
    assert!(Command::new("kill").args([signal, &pid.to_string()]).status().unwrap().success());
}

/// Whether there is such a process, zombies not counted.
pub(crate) fn is_there(pid: u64) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
}

/// A VM that is killed at the end of its test, whatever becomes of that.
pub(crate) struct Mortal(pub(crate) u64);

impl Mortal {
    pub(crate) fn of(vm: &Value) -> Self {
        Mortal(vm["pid"].as_u64().unwrap())
    }
}

impl Drop for Mortal {
    fn drop(&mut self) {
        if is_there(self.0) {
            kill("-9", self.0);
        }
    }
}

/// A store with the snapshot `vm`, and a daemon on it.
pub(crate) fn served(scene: &Scene, options: &[&str]) -> Served {
    parked(scene);
    Served::start(scene, options)
}
