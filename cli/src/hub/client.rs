//! Requests to the hub. They use https unless the endpoint is http. Redirects are followed here,
//! so that only the endpoint gets the token.

use std::fmt;
use std::io::Read;
use std::path::Path;
use std::thread;
use std::time::Duration;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use qlora_wgpu::internal::{MAX_SMALL, read_small};
use serde::Deserialize;
use ureq::http::header::{AUTHORIZATION, LOCATION, RANGE};
use ureq::http::response::Parts;
use ureq::http::{HeaderMap, StatusCode, Uri};
use ureq::tls::{PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, Body};

use super::cache::is_commit;
use super::env::Settings;

/// Time limit for resolving the name, and again for connecting.
const CONNECT: Duration = Duration::from_secs(5);

/// Maximum bytes of the answer about a model. A repository with 100 000 files has half of it.
const MAX_INFO: u64 = 32 << 20;

/// Maximum redirects per request. The hub uses two.
const MAX_REDIRECTS: usize = 10;

/// Tries in a row.
pub(super) const TRIES: u32 = 4;

/// Characters other than these are percent-encoded in a part of a URL.
const PLAIN: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');

/// Why a request failed.
#[derive(Debug)]
pub(super) enum Fault {
    /// Temporary; another try may succeed.
    Passing(String),
    /// The hub can't be reached or answers nonsense; the cache may help.
    Away(String),
    /// Permanent; another try would fail the same way.
    Final(String),
}

/// The commit of a revision, and its files.
#[derive(Deserialize)]
pub(super) struct Info {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
}

/// An answer that isn't a redirect.
pub(super) struct Answer {
    pub status: StatusCode,
    /// Headers of the answer.
    pub headers: HeaderMap,
    /// Headers of the hub's own answers on the way, as the hub describes files when it redirects.
    pub hub: Vec<HeaderMap>,
    pub body: Body,
}

pub(super) struct Client {
    agent: Agent,
    /// URL without a slash at its end.
    endpoint: String,
    uri: Uri,
    token: Option<String>,
    /// Time limit for an answer to begin.
    answer: Duration,
    /// Time limit for more bytes.
    stall: Duration,
}

impl Client {
    /// # Errors
    /// A sentence, if the endpoint isn't a URL or the certificates can't be read.
    pub(super) fn new(settings: &Settings) -> Result<Client, String> {
        let endpoint = settings.endpoint.clone();
        let not = || format!("HF_ENDPOINT is {endpoint:?}, but must be a URL such as https://huggingface.co");
        let uri: Uri = endpoint.parse().map_err(|_| not())?;
        if !matches!(uri.scheme_str(), Some("http" | "https")) || uri.host().is_none_or(str::is_empty) {
            return Err(not());
        }
        // Proxies come from the environment, by default.
        let agent = Agent::config_builder()
            .http_status_as_error(false)
            .tls_config(TlsConfig::builder().root_certs(roots(settings.certificates.as_deref())?).build())
            .https_only(uri.scheme_str() == Some("https"))
            .max_redirects(0)
            .timeout_resolve(Some(CONNECT))
            .timeout_connect(Some(CONNECT))
            .timeout_recv_response(Some(settings.answer))
            .timeout_per_read(Some(settings.stall))
            // Sizes and digests are for uncompressed files.
            .accept_encoding("identity")
            .user_agent(concat!("qlora-wgpu/", env!("CARGO_PKG_VERSION")))
            .build()
            .new_agent();
        let (token, answer, stall) = (settings.token.clone(), settings.answer, settings.stall);
        Ok(Client { agent, endpoint, uri, token, answer, stall })
    }

    /// Time after which a download without new bytes is given up.
    pub(super) fn stall(&self) -> Duration {
        self.stall
    }

    /// URL of a file in a commit.
    pub(super) fn file_url(&self, repo: &str, commit: &str, name: &str) -> String {
        let parts: Vec<String> = name.split('/').map(encoded).collect();
        format!("{}/{repo}/resolve/{commit}/{}", self.endpoint, parts.join("/"))
    }

    /// Asks the hub about a revision.
    pub(super) fn info(&self, repo: &str, revision: &str) -> Result<Info, Fault> {
        // Sent without a query, because some mirrors don't support one.
        let url = format!("{}/api/models/{repo}/revision/{}", self.endpoint, encoded(revision));
        let mut tries = 1;
        loop {
            match self.info_once(repo, &url) {
                Err(Fault::Passing(_)) if tries < TRIES => self.pause(tries),
                Err(Fault::Passing(message)) => return Err(Fault::Away(message)),
                done => return done,
            }
            tries += 1;
        }
    }

    fn info_once(&self, repo: &str, url: &str) -> Result<Info, Fault> {
        let answer = self.get(url, 0, Some(2 * self.answer))?;
        if answer.status != StatusCode::OK {
            return Err(self.refusal(repo, &answer));
        }
        let mut text = Vec::new();
        let mut reader = answer.body.into_reader().take(MAX_INFO + 1);
        reader.read_to_end(&mut text).map_err(|e| self.failed(e.into()))?;
        if text.len() as u64 > MAX_INFO {
            return Err(self.away(&format!("its answer is longer than {} MiB", MAX_INFO >> 20)));
        }
        let info: Info =
            serde_json::from_slice(&text).map_err(|e| self.away(&format!("its answer is not a model's: {e}")))?;
        // The commit becomes part of paths.
        if is_commit(&info.sha) {
            Ok(info)
        } else {
            Err(self.away(&format!("it answers with the commit {:?}, which isn't a commit id", info.sha)))
        }
    }

    /// Requests the bytes from `start` on and follows redirects. `limit` bounds the whole request.
    pub(super) fn get(&self, url: &str, start: u64, limit: Option<Duration>) -> Result<Answer, Fault> {
        let mut uri: Uri = url.parse().map_err(|_| Fault::Final(format!("{url} isn't a URL")))?;
        let mut seen = vec![];
        let mut hub = vec![];
        loop {
            let at_endpoint = origin(&uri) == origin(&self.uri);
            let mut request = self.agent.get(uri.clone());
            if start > 0 {
                request = request.header(RANGE, format!("bytes={start}-"));
            }
            if let Some(token) = self.token.as_ref().filter(|_| at_endpoint) {
                request = request.header(AUTHORIZATION, format!("Bearer {token}"));
            }
            let response = request.config().timeout_global(limit).build().call();
            let (head, body) = response.map_err(|e| self.failed(e))?.into_parts();
            if at_endpoint || head.headers.contains_key("x-repo-commit") {
                hub.push(head.headers.clone());
            }
            if !matches!(head.status.as_u16(), 301 | 302 | 303 | 307 | 308) {
                return Ok(Answer { status: head.status, headers: head.headers, hub, body });
            }
            let next = self.redirect(&uri, &head)?;
            seen.push(uri);
            if seen.contains(&next) {
                return Err(Fault::Final(format!("{url} redirects in a loop, back to {}", shown(&next))));
            }
            if seen.len() > MAX_REDIRECTS {
                return Err(Fault::Final(format!("{url} redirects more than {MAX_REDIRECTS} times")));
            }
            uri = next;
        }
    }

    /// Target of a redirect.
    fn redirect(&self, uri: &Uri, head: &Parts) -> Result<Uri, Fault> {
        let fault = |what: String| Fault::Final(format!("{} redirects {what}", shown(uri)));
        let location = head.headers.get(LOCATION);
        let location = location.ok_or_else(|| fault(format!("(status {}) with no Location", head.status.as_u16())))?;
        let next = location.to_str().ok().and_then(|location| join(uri, location));
        let next = next.ok_or_else(|| {
            fault(format!("to {:?}, which isn't a URL", String::from_utf8_lossy(location.as_bytes())))
        })?;
        if self.uri.scheme_str() == Some("https") && next.scheme_str() != Some("https") {
            return Err(fault(format!("to {}, which is not https", shown(&next))));
        }
        Ok(next)
    }

    /// Explains an unsuccessful answer.
    pub(super) fn refusal(&self, repo: &str, answer: &Answer) -> Fault {
        let status = answer.status.as_u16();
        let is_gated = answer.hub.iter().any(|head| head.get("x-error-code").is_some_and(|code| code == "GatedRepo"));
        let page = format!("{}/{repo}", self.endpoint);
        let has_token = self.token.is_some();
        match status {
            401 | 403 if is_gated || status == 403 => Fault::Final(if has_token {
                format!("it is gated, and this HF_TOKEN has no access: ask for it at {page} (status {status})")
            } else {
                format!("it is gated: ask for access at {page}, and set HF_TOKEN (status {status})")
            }),
            401 if has_token => Fault::Final(format!("{} does not know this HF_TOKEN (status 401)", self.endpoint)),
            401 => Fault::Final(format!("{page} does not exist or is private; set HF_TOKEN if it is (status 401)")),
            404 => Fault::Final(format!(
                "{} has no such model, revision or file, or this HF_TOKEN has no access (status 404)",
                self.endpoint
            )),
            408 | 429 | 500..=599 => Fault::Passing(format!("{} answers with status {status}", self.endpoint)),
            _ => Fault::Away(format!("{} answers with status {status}", self.endpoint)),
        }
    }

    /// Waits before the next try, after `tries` tries.
    pub(super) fn pause(&self, tries: u32) {
        let first = (self.stall / 20).min(Duration::from_millis(500));
        thread::sleep(first * 2u32.pow(tries.saturating_sub(1)));
    }

    fn failed(&self, error: ureq::Error) -> Fault {
        use std::io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
        let passing = [BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof];
        let is_passing = matches!(&error, ureq::Error::Io(e) if passing.contains(&e.kind()));
        match self.away(&self.cause(error)) {
            Fault::Away(message) if is_passing => Fault::Passing(message),
            fault => fault,
        }
    }

    fn away(&self, reason: &dyn fmt::Display) -> Fault {
        Fault::Away(format!("{} cannot be reached ({reason})", self.endpoint))
    }

    /// Explains a failure to people.
    pub(super) fn cause(&self, error: ureq::Error) -> String {
        use ureq::Timeout;
        match error {
            ureq::Error::Timeout(Timeout::Resolve | Timeout::Connect) => {
                format!("no connection within {CONNECT:?}")
            }
            ureq::Error::Timeout(Timeout::Global) => format!("no whole answer within {:?}", 2 * self.answer),
            ureq::Error::Timeout(Timeout::RecvResponse) => format!("no answer within {:?}", self.answer),
            ureq::Error::Timeout(_) => format!("nothing came for {:?}", self.stall),
            ureq::Error::Io(e) => match e.downcast() {
                Ok(inner) => self.cause(inner),
                Err(e) => e.to_string(),
            },
            e => e.to_string(),
        }
    }
}

impl Info {
    pub(super) fn commit(&self) -> &str {
        &self.sha
    }

    /// File names as the hub gives them.
    pub(super) fn files(&self) -> Vec<String> {
        self.siblings.iter().map(|sibling| sibling.rfilename.clone()).collect()
    }
}

/// The certificates to trust: those in a file, or otherwise those that browsers trust.
fn roots(file: Option<&Path>) -> Result<RootCerts, String> {
    let Some(file) = file else { return Ok(RootCerts::WebPki) };
    let pem = read_small(file, MAX_SMALL).map_err(|e| format!("the certificates cannot be read: {e}"))?;
    let items = parse_pem(&pem).collect::<Result<Vec<_>, _>>().map_err(|e| format!("{}: {e}", file.display()))?;
    let certificates: Vec<_> = items
        .into_iter()
        .filter_map(|item| match item {
            PemItem::Certificate(certificate) => Some(certificate),
            _ => None,
        })
        .collect();
    if certificates.is_empty() {
        Err(format!("{} holds no certificates", file.display()))
    } else {
        Ok(certificates.into())
    }
}

fn encoded(part: &str) -> String {
    utf8_percent_encode(part, PLAIN).to_string()
}

/// A URL without its query, which may contain a signature.
fn shown(uri: &Uri) -> String {
    let authority = uri.authority().map_or("", |authority| authority.as_str());
    format!("{}://{authority}{}", uri.scheme_str().unwrap_or_default(), uri.path())
}

/// Origin of a URL: scheme, host and port.
fn origin(uri: &Uri) -> (Option<&str>, Option<String>, Option<u16>) {
    let default = if uri.scheme_str() == Some("https") { 443 } else { 80 };
    (uri.scheme_str(), uri.host().map(str::to_ascii_lowercase), Some(uri.port_u16().unwrap_or(default)))
}

/// Resolves a redirect's location against `base`.
fn join(base: &Uri, location: &str) -> Option<Uri> {
    let location = location.split('#').next().unwrap_or_default();
    let (scheme, authority) = (base.scheme_str()?, base.authority()?);
    let is_scheme =
        |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"+-.".contains(&b));
    let url = if location.split_once("://").is_some_and(|(scheme, _)| is_scheme(scheme)) {
        location.to_owned()
    } else if location.starts_with("//") {
        format!("{scheme}:{location}")
    } else if location.starts_with('/') {
        format!("{scheme}://{authority}{location}")
    } else if location.starts_with('?') {
        format!("{scheme}://{authority}{}{location}", base.path())
    } else {
        let folder = base.path().rsplit_once('/').map_or("", |(folder, _)| folder);
        format!("{scheme}://{authority}{folder}/{location}")
    };
    let uri: Uri = url.parse().ok()?;
    let is_web = matches!(uri.scheme_str(), Some("http" | "https")) && uri.host().is_some_and(|host| !host.is_empty());
    is_web.then_some(uri)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_redirect_leads_where_a_browser_would_go() {
        let base: Uri = "https://hub.co:8443/org/name/resolve/main/a.json?b=c".parse().unwrap();
        for (location, url) in [
            ("https://cdn.co/a?b=https://c", "https://cdn.co/a?b=https://c"),
            ("HTTP://cdn.co/a", "http://cdn.co/a"),
            ("//cdn.co/a", "https://cdn.co/a"),
            ("/a?to=http://c#part", "https://hub.co:8443/a?to=http://c"),
            ("?d=e", "https://hub.co:8443/org/name/resolve/main/a.json?d=e"),
            ("b.json?to=http://c", "https://hub.co:8443/org/name/resolve/main/b.json?to=http://c"),
        ] {
            assert_eq!(join(&base, location).map(|uri| uri.to_string()).as_deref(), Some(url), "{location}");
        }
        for location in ["ftp://a/b", "file:///etc/passwd", "http://", "//", "http://[", "https:///a"] {
            assert_eq!(join(&base, location), None, "{location}");
        }
    }

    #[test]
    fn an_origin_is_a_scheme_a_host_and_a_port() {
        let same = |a: &str, b: &str| origin(&a.parse().unwrap()) == origin(&b.parse().unwrap());
        assert!(same("https://hub.co/a", "https://HUB.co:443/b") && same("http://hub.co", "http://hub.co:80/"));
        for other in ["http://hub.co", "https://hub.co:8443", "https://hub.co.evil.co", "https://evil.co/hub.co"] {
            assert!(!same("https://hub.co", other), "{other}");
        }
    }
}
