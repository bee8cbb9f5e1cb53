//! The hub against a small server that speaks its protocol, and against its cache alone.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use engine::hub::{HubError, HubOptions, resolve};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A folder that goes with the test.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("engine-hub-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Serves one repository, `org/name`, with these files.
struct Server {
    endpoint: String,
    downloads: Arc<AtomicUsize>,
}

fn serve(files: &[(&str, &str)]) -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let files: HashMap<String, String> = files
        .iter()
        .map(|(k, v)| (k.to_string(), v.to_string()))
        .collect();
    let downloads = Arc::new(AtomicUsize::new(0));
    let count = downloads.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let (files, count) = (files.clone(), count.clone());
            std::thread::spawn(move || answer(stream, &files, &count));
        }
    });
    Server {
        endpoint,
        downloads,
    }
}

fn answer(mut stream: TcpStream, files: &HashMap<String, String>, downloads: &AtomicUsize) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut first = String::new();
    reader.read_line(&mut first).unwrap();
    let mut range = String::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        if line.trim().is_empty() {
            break;
        }
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("range: bytes=") {
            range = value.trim().to_string();
        }
    }
    let path = first.split(' ').nth(1).unwrap_or_default().to_string();
    let (status, body, headers) = if path == "/api/models/org/name/revision/main" {
        let siblings: Vec<_> = files
            .keys()
            .map(|name| serde_json::json!({"rfilename": name}))
            .collect();
        let info = serde_json::json!({"siblings": siblings, "sha": COMMIT});
        ("200 OK", info.to_string(), String::new())
    } else if let Some(text) = path
        .strip_prefix("/org/name/resolve/main/")
        .and_then(|name| files.get(name))
    {
        let (from, to) = range.split_once('-').unwrap();
        let from: usize = from.parse().unwrap();
        let to = to
            .parse()
            .map_or(text.len(), |to: usize| to + 1)
            .min(text.len());
        if to - from > 1 {
            downloads.fetch_add(1, Ordering::SeqCst);
        }
        let headers = format!(
            "etag: \"{:x}\"\r\nx-repo-commit: {COMMIT}\r\ncontent-range: bytes {from}-{}/{}\r\n",
            text.len() * 31 + text.bytes().map(usize::from).sum::<usize>(),
            to - 1,
            text.len()
        );
        ("206 Partial Content", text[from..to].to_string(), headers)
    } else {
        ("404 Not Found", String::new(), String::new())
    };
    let _ = write!(
        stream,
        "HTTP/1.1 {status}\r\n{headers}content-length: {}\r\nconnection: close\r\n\r\n{body}",
        body.len()
    );
}

fn options(cache: &Folder, endpoint: &str) -> HubOptions {
    HubOptions {
        cache_dir: cache.0.clone(),
        endpoint: endpoint.to_string(),
        token: None,
        offline: false,
        progress: false,
    }
}

const INDEX: &str = r#"{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors",
                       "c": "model-1.safetensors"}}"#;

#[test]
fn a_model_is_fetched_once_and_then_served_from_the_cache() {
    let server = serve(&[
        ("config.json", "{\"config\": 1}"),
        ("tokenizer.json", "{\"tokenizer\": 1}"),
        ("README.md", "not wanted"),
        ("pytorch_model.bin", "not wanted"),
        ("model.safetensors.index.json", INDEX),
        ("model-1.safetensors", "first shard"),
        ("model-2.safetensors", "second shard"),
    ]);
    let cache = Folder::new("fetch");
    let mut options = options(&cache, &server.endpoint);
    let dir = resolve("org/name", None, true, &options).unwrap();
    let read = |file: &str| std::fs::read_to_string(dir.join(file)).ok();
    assert_eq!(read("config.json").as_deref(), Some("{\"config\": 1}"));
    assert_eq!(read("model-2.safetensors").as_deref(), Some("second shard"));
    assert!(read("tokenizer.json").is_some());
    assert_eq!((read("README.md"), read("pytorch_model.bin")), (None, None));
    assert_eq!(server.downloads.load(Ordering::SeqCst), 5);

    assert_eq!(resolve("org/name", None, true, &options).unwrap(), dir);
    assert_eq!(
        server.downloads.load(Ordering::SeqCst),
        5,
        "nothing is fetched twice"
    );
    // The hub is away: the copy serves; and offline nobody even asks.
    options.endpoint = "http://127.0.0.1:9".to_string();
    assert_eq!(resolve("org/name", None, true, &options).unwrap(), dir);
    options.offline = true;
    assert_eq!(resolve("org/name", None, true, &options).unwrap(), dir);
    assert_eq!(
        resolve("org/name", Some(COMMIT), true, &options).unwrap(),
        dir
    );

    std::fs::remove_file(dir.join("model-2.safetensors")).unwrap();
    let error = resolve("org/name", None, true, &options)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("org/name: `model-2.safetensors` is not in the cache"),
        "{error}"
    );
    assert!(error.contains("HF_HUB_OFFLINE is set"), "{error}");
    assert!(
        resolve("org/name", None, false, &options).is_ok(),
        "dummy weights need no shards"
    );
}

#[test]
fn what_the_hub_does_not_have_is_told_in_one_line() {
    let server = serve(&[
        ("config.json", "{\"config\": 1}"),
        ("pytorch_model.bin", "weights"),
    ]);
    let cache = Folder::new("missing");
    let options = options(&cache, &server.endpoint);
    let error = resolve("org/name", None, true, &options).unwrap_err();
    assert!(matches!(error, HubError::NoSafetensors { .. }), "{error}");
    for (model, revision) in [("org/other", None), ("org/name", Some("v2"))] {
        let error = resolve(model, revision, true, &options).unwrap_err();
        assert!(matches!(error, HubError::NotFound { .. }), "{error}");
        assert!(!error.to_string().contains('\n'));
    }
}

#[test]
fn without_network_and_cache_the_error_says_what_to_do() {
    let cache = Folder::new("empty");
    let mut options = options(&cache, "http://127.0.0.1:9");
    for offline in [false, true] {
        options.offline = offline;
        let error = resolve("org/name", None, true, &options)
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with("org/name: `config.json` is not in the cache"),
            "{error}"
        );
        assert!(error.contains("give a local directory"), "{error}");
        assert!(!error.contains('\n'));
    }
}

#[test]
fn directories_and_impossible_names() {
    let folder = Folder::new("local");
    let options = options(&folder, "http://127.0.0.1:9");
    let path = folder.0.to_str().unwrap();
    assert_eq!(resolve(path, None, true, &options).unwrap(), folder.0);
    for missing in ["/no/such/dir", "./nothing", "a/b/c"] {
        let error = resolve(missing, None, true, &options).unwrap_err();
        assert!(matches!(error, HubError::NoSuchDirectory(_)), "{error}");
    }
    for bad in ["", "org/", "org/na me"] {
        let error = resolve(bad, None, true, &options).unwrap_err();
        assert!(matches!(error, HubError::BadId(_)), "{error}");
    }
}
