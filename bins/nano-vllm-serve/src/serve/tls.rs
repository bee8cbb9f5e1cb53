//! HTTPS, with certificates that can be renewed without a restart.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use anyhow::Context;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::server::danger::ClientCertVerifier;
use tokio_rustls::rustls::{RootCertStore, ServerConfig};

use super::args::ServerArgs;

/// How often --enable-ssl-refresh looks at the files.
const REFRESH: Duration = Duration::from_secs(1);

/// The certificate that new connections get, and those that they must bring.
pub struct Tls {
    files: Files,
    config: RwLock<Arc<ServerConfig>>,
    /// One reading at a time: else a slow one could undo a later one.
    reading: Mutex<()>,
    /// The files before they were first read: what has changed since then is to be read again,
    /// even if a model was loaded in between.
    first: Changed,
}

/// When each file was last changed, and its length; nothing for one that is gone.
type Changed = Vec<Option<(SystemTime, u64)>>;

/// Where it is read from.
struct Files {
    certificate: PathBuf,
    key: PathBuf,
    /// Authorities of clients, and whether a client must have a certificate.
    clients: Option<(PathBuf, bool)>,
}

impl Tls {
    /// Reads the files that the flags name, if they name any.
    pub fn from_args(args: &ServerArgs) -> anyhow::Result<Option<Self>> {
        let (Some(certificate), Some(key)) = (&args.ssl_certfile, &args.ssl_keyfile) else {
            return Ok(None);
        };
        let files = Files {
            certificate: certificate.clone(),
            key: key.clone(),
            clients: args
                .ssl_ca_certs
                .clone()
                .map(|path| (path, args.ssl_cert_reqs == 2)),
        };
        Ok(Some(Self {
            first: files.changed(),
            config: RwLock::new(files.read()?),
            reading: Mutex::default(),
            files,
        }))
    }

    /// Reads all files again; after an error what was read before stays. The log has either. Waits
    /// for the disk: not for threads that answer.
    pub fn reload(&self) {
        let _reading = self.reading.lock().unwrap_or_else(PoisonError::into_inner);
        match self.files.read() {
            Ok(config) => {
                *self.config.write().unwrap_or_else(PoisonError::into_inner) = config;
                tracing::info!("the certificate was read again");
            }
            Err(error) => tracing::error!("the old certificate stays: {error:#}"),
        }
    }

    /// Reads the files again whenever one of them has changed, until the task is dropped.
    pub async fn follow_files(self: Arc<Self>) {
        let mut seen = self.first.clone();
        loop {
            tokio::time::sleep(REFRESH).await;
            let (tls, before) = (self.clone(), seen.clone());
            // A slow disk must not hold up the probes that this thread answers.
            let look = tokio::task::spawn_blocking(move || tls.reload_changed(before));
            if let Ok(now) = look.await {
                seen = now;
            }
        }
    }

    /// Reads the files again if they are not as they were in `seen`; returns how they are.
    fn reload_changed(&self, seen: Changed) -> Changed {
        let now = self.files.changed();
        if now != seen {
            // Certificate and key may be half way through being replaced: an error now is
            // followed by another try once the other file has changed, too.
            self.reload();
        }
        now
    }

    /// For one handshake.
    pub fn acceptor(&self) -> TlsAcceptor {
        let config = self.config.read().unwrap_or_else(PoisonError::into_inner);
        TlsAcceptor::from(config.clone())
    }
}

impl Files {
    fn changed(&self) -> Changed {
        let clients = self.clients.as_ref().map(|(path, _)| path);
        [Some(&self.certificate), Some(&self.key), clients]
            .into_iter()
            .flatten()
            .map(|path| {
                let metadata = std::fs::metadata(path).ok()?;
                Some((metadata.modified().ok()?, metadata.len()))
            })
            .collect()
    }

    fn read(&self) -> anyhow::Result<Arc<ServerConfig>> {
        let chain = certificates(&self.certificate)?;
        let private = PrivateKeyDer::from_pem_file(&self.key)
            .with_context(|| format!("{} holds no private key in PEM", self.key.display()))?;
        let provider = Arc::new(ring::default_provider());
        let builder = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()?;
        let builder = match &self.clients {
            None => builder.with_no_client_auth(),
            Some((path, must)) => {
                let verifier = verifier(path, *must, provider)?;
                builder.with_client_cert_verifier(verifier)
            }
        };
        let config = builder
            .with_single_cert(chain, private)
            .context("the certificate and the private key do not fit each other")?;
        Ok(Arc::new(config))
    }
}

fn certificates(path: &Path) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let context = || format!("{} holds no certificate in PEM", path.display());
    let chain: Vec<_> = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect)
        .with_context(context)?;
    anyhow::ensure!(!chain.is_empty(), "{}", context());
    Ok(chain)
}

/// Checks clients' certificates; without one a client comes in unless it `must` have one.
fn verifier(
    authorities: &Path,
    must: bool,
    provider: Arc<tokio_rustls::rustls::crypto::CryptoProvider>,
) -> anyhow::Result<Arc<dyn ClientCertVerifier>> {
    let context = || format!("{} cannot check clients", authorities.display());
    let mut roots = RootCertStore::empty();
    for certificate in certificates(authorities)? {
        roots.add(certificate).with_context(context)?;
    }
    let builder = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
    match must {
        true => builder.build(),
        false => builder.allow_unauthenticated().build(),
    }
    .with_context(context)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::serve::ServeArgs;

    #[derive(Parser)]
    struct Flags {
        #[command(flatten)]
        serve: ServeArgs,
    }

    /// Of nobody: made for tests.
    const KEY: &str = include_str!("../../tests/data/localhost.key");
    const CERTIFICATE: &str = include_str!("../../tests/data/localhost.pem");

    #[test]
    fn a_change_while_the_model_loads_is_seen() {
        let file = |name: &str, text: &str| {
            let name = format!("nano-vllm-tls-{}-{name}", std::process::id());
            let path = std::env::temp_dir().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let (certificate, key) = (file("cert", CERTIFICATE), file("key", KEY));
        let flags = Flags::parse_from([
            "serve".as_ref(),
            "--ssl-certfile".as_ref(),
            certificate.as_os_str(),
            "--ssl-keyfile".as_ref(),
            key.as_os_str(),
        ]);
        let tls = Tls::from_args(&flags.serve.server).unwrap().unwrap();
        let config = || tls.config.read().unwrap().clone();
        let before = config();
        let same = tls.reload_changed(tls.first.clone());
        assert!(Arc::ptr_eq(&before, &config()), "nothing has changed");
        assert_eq!(same, tls.first);

        // Another length: clocks of file systems are coarse.
        file("cert", &format!("{CERTIFICATE}\n"));
        let now = tls.reload_changed(tls.first.clone());
        assert!(!Arc::ptr_eq(&before, &config()), "it was not read again");
        assert_ne!(now, tls.first);
        for path in [certificate, key] {
            std::fs::remove_file(path).unwrap();
        }
    }
}
