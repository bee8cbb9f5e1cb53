//! Where connections come from: a TCP port, or a Unix socket (`--uds`).

use std::fmt::{self, Display, Formatter};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::Context;
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

use super::args::ServerArgs;

/// Accepts connections. A socket's file goes with it.
pub enum Listener {
    Tcp(TcpListener),
    /// The file goes first: a server that starts meanwhile finds this one listening, or no file.
    Unix(SocketFile, UnixListener),
}

/// A connection on the thread that accepted it.
pub enum Accepted {
    Tcp(TcpStream),
    Unix(UnixStream),
}

/// A connection between two runtimes.
pub enum Detached {
    Tcp(std::net::TcpStream),
    Unix(std::os::unix::net::UnixStream),
}

/// The path of a socket, removed when dropped, if it is still this socket.
pub struct SocketFile {
    path: PathBuf,
    /// Device and inode.
    id: (u64, u64),
}

impl SocketFile {
    fn new(path: &Path) -> io::Result<Self> {
        Ok(Self {
            path: path.to_owned(),
            id: Self::id(path)?,
        })
    }

    fn id(path: &Path) -> io::Result<(u64, u64)> {
        let metadata = std::fs::symlink_metadata(path)?;
        Ok((metadata.dev(), metadata.ino()))
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if Self::id(&self.path).is_ok_and(|id| id == self.id) {
            // Whoever listens there next removes it, too.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

impl Listener {
    /// Listens where the flags say.
    pub async fn bind(args: &ServerArgs) -> anyhow::Result<Self> {
        if let Some(path) = &args.uds {
            let refused = || format!("cannot listen on --uds {}", path.display());
            remove_stale(path).with_context(refused)?;
            let listener = UnixListener::bind(path).with_context(refused)?;
            let file = SocketFile::new(path).with_context(refused)?;
            return Ok(Listener::Unix(file, listener));
        }
        let listener = TcpListener::bind((args.host.as_str(), args.port)).await;
        let refused = || format!("cannot listen on {}:{}", args.host, args.port);
        listener.map(Listener::Tcp).with_context(refused)
    }

    /// The next connection.
    pub async fn accept(&self) -> io::Result<Accepted> {
        Ok(match self {
            Listener::Tcp(listener) => Accepted::Tcp(listener.accept().await?.0),
            Listener::Unix(_, listener) => Accepted::Unix(listener.accept().await?.0),
        })
    }

    /// Where clients find it.
    pub fn address(&self, tls: bool) -> anyhow::Result<Address> {
        Ok(match self {
            Listener::Tcp(listener) => Address::Tcp(
                if tls { "https" } else { "http" },
                listener.local_addr().context("cannot listen")?,
            ),
            Listener::Unix(file, _) => Address::Unix(file.path.clone()),
        })
    }
}

/// A URL, but for a Unix socket, which has none that all clients know.
pub enum Address {
    Tcp(&'static str, std::net::SocketAddr),
    Unix(PathBuf),
}

impl Display for Address {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Address::Tcp(scheme, address) => write!(f, "{scheme}://{address}"),
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// Removes a socket that nobody listens on, such as that of a process that was killed. Everything
/// else that has the name stays, and binding fails.
fn remove_stale(path: &Path) -> io::Result<()> {
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket());
    let nobody = || {
        let tried = std::os::unix::net::UnixStream::connect(path);
        tried.is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
    };
    match is_socket && nobody() {
        true => std::fs::remove_file(path),
        false => Ok(()),
    }
}

impl Accepted {
    /// Takes it from this thread's runtime.
    pub fn detach(self) -> io::Result<Detached> {
        Ok(match self {
            Accepted::Tcp(stream) => Detached::Tcp(stream.into_std()?),
            Accepted::Unix(stream) => Detached::Unix(stream.into_std()?),
        })
    }
}

impl Detached {
    /// Gives it to the runtime of the thread that calls.
    pub fn attach(self) -> io::Result<Accepted> {
        Ok(match self {
            Detached::Tcp(stream) => Accepted::Tcp(TcpStream::from_std(stream)?),
            Detached::Unix(stream) => Accepted::Unix(UnixStream::from_std(stream)?),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn only_the_own_socket_is_removed() {
        let path = std::env::temp_dir().join(format!("nano-vllm-own-{}", std::process::id()));
        let first = UnixListener::bind(&path).unwrap();
        let file = SocketFile::new(&path).unwrap();
        // Somebody else takes the path.
        std::fs::remove_file(&path).unwrap();
        let second = UnixListener::bind(&path).unwrap();
        drop((file, first));
        assert!(path.exists(), "the socket of another was removed");

        let file = SocketFile::new(&path).unwrap();
        drop((file, second));
        assert!(!path.exists(), "the own socket is still there");
    }
}
