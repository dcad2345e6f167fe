//! Lists of models, scopes by path and shadow mode, through a real Envoy that passes the body on.

use crate::support::Stack;
use crate::support::grpc::{Authorizer, Check, Encoding};
use crate::support::http::Request;
use crate::support::keyward::{Key, Keyward};

const CHAT: &str = "/v1/chat/completions";

async fn restricted(change: &[(&str, &str)]) -> (Stack, Key) {
    let builder = change.iter().fold(Keyward::new(), |builder, (flag, value)| builder.arg(flag, value));
    let stack = Stack::start_with(builder, |envoy| envoy).await;
    stack.keyward.create_user("ada", &[]);
    let options = ["--hash", "sha256", "--allowed-models", "gpt-4o*,bedrock/*", "--scopes", "chat"];
    let key = stack.keyward.create_key("ada", "ci", &options);
    (stack, key)
}

/// The body that is decided on is the one that the upstream gets.
#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_is_not_on_the_list_is_refused_wherever_it_is_named() {
    let (stack, key) = restricted(&[]).await;
    let send = async |path: &str, body: &str| {
        let request = Request::post(path, body).bearer(&key.secret);
        request.send(stack.envoy.addr()).await
    };
    for body in [r#"{"model":"gpt-4o-mini"}"#, r#"{"messages":[{"content":"\\"}],"\u006dodel":"bedrock/x"}"#]
    {
        let response = send(CHAT, body).await;
        assert_eq!(response.status, 200, "{body}: {}", response.text());
        assert_eq!(response.echo().body, body);
    }
    for (path, body, status, expected) in [
        (CHAT, r#"{"model":"claude-3"}"#, 403, "model_not_allowed"),
        (CHAT, r#"{"model":"bedrockz/x"}"#, 403, "model_not_allowed"),
        (CHAT, r#"{"model":"gpt-4o","fallbacks":["claude-3"]}"#, 403, "model_not_allowed"),
        (CHAT, r#"{"model":"gpt-4o","model":"claude-3"}"#, 400, "ambiguous_request"),
        (CHAT, r#"{"model":"gpt-4o","Model":"claude-3"}"#, 400, "ambiguous_request"),
        (CHAT, "model=gpt-4o", 400, "ambiguous_request"),
        (CHAT, "", 400, "ambiguous_request"),
        ("/model/claude-3/invoke", "{}", 403, "model_not_allowed"),
        ("/v1beta/models/claude-3:generateContent", "{}", 403, "model_not_allowed"),
        ("/openai/deployments/claude-3/chat/completions", "{}", 403, "model_not_allowed"),
    ] {
        let response = send(path, body).await;
        assert_eq!((response.status, response.reason()), (status, expected), "{path} {body}");
        assert!(!response.text().contains("gpt-4o*"), "the list is nobody's business: {}", response.text());
    }
    let large = format!(r#"{{"model":"gpt-4o","x":"{}"}}"#, "x".repeat(5 << 20));
    let response = send(CHAT, &large).await;
    assert_eq!((response.status, response.reason()), (400, "ambiguous_request"));
    assert!(response.text().contains("too large"), "{}", response.text());
    let compressed = Request::post(CHAT, r#"{"model":"gpt-4o"}"#).header("content-encoding", "gzip");
    let response = compressed.bearer(&key.secret).send(stack.envoy.addr()).await;
    assert_eq!(response.status, 400, "{}", response.text());
}

/// Large bodies are nobody's concern where no list has to be held.
#[tokio::test(flavor = "multi_thread")]
async fn a_key_without_a_list_may_send_any_body() {
    let (stack, _) = restricted(&[]).await;
    let open = stack.keyward.create_key("ada", "open", &["--hash", "sha256"]);
    for body in ["not json".to_owned(), "x".repeat(5 << 20)] {
        let request = Request::post(CHAT, &body).bearer(&open.secret);
        assert_eq!(request.send(stack.envoy.addr()).await.status, 200, "{} bytes", body.len());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_form_names_its_model_among_files() {
    let (stack, key) = restricted(&[]).await;
    let form = |model: &str| {
        format!(
            "--b1\r\nContent-Disposition: form-data; name=\"file\"; filename=\"a.mp3\"\r\n\r\n\0\u{1}\r\n\
             --b1\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\n{model}\r\n--b1--\r\n"
        )
    };
    for (path, model, expected) in [
        ("/v1/audio/transcriptions", "gpt-4o-transcribe", ""),
        ("/v1/audio/transcriptions", "whisper-1", "model_not_allowed"),
        // JSON is expected there, and a form could be JSON to the upstream.
        (CHAT, "gpt-4o", "ambiguous_request"),
    ] {
        let request = Request::post_as("multipart/form-data; boundary=b1", path, &form(model));
        let response = request.bearer(&key.secret).send(stack.envoy.addr()).await;
        assert_eq!(response.reason(), expected, "{path} {model}: {}", response.text());
    }
}

/// Envoy that does not pass the body on, or as text: nothing is guessed.
#[tokio::test(flavor = "multi_thread")]
async fn without_the_body_a_key_with_a_list_is_told_what_is_missing() {
    let keyward = Keyward::new().start().await;
    keyward.create_user("ada", &[]);
    let key = keyward.create_key("ada", "ci", &["--hash", "sha256", "--allowed-models", "gpt-4o"]);
    let authorizer = Authorizer::connect(keyward.grpc_addr()).await;
    let answer = authorizer.check(Check::new("POST", CHAT).bearer(&key.secret).build(Encoding::Raw)).await;
    assert_eq!(answer.http_status(), 400);
    assert!(answer.body().contains("with_request_body"), "{}", answer.body());
}

#[tokio::test(flavor = "multi_thread")]
async fn scopes_are_asked_for_by_path() {
    let (stack, key) = restricted(&[("--scope-paths", "POST /v1/chat/**=chat,/v1/files=files")]).await;
    let chat = Request::post(CHAT, r#"{"model":"gpt-4o"}"#).bearer(&key.secret);
    assert_eq!(chat.send(stack.envoy.addr()).await.status, 200);
    let files = Request::get("/v1/files").bearer(&key.secret).send(stack.envoy.addr()).await;
    assert_eq!((files.status, files.reason()), (403, "scope_missing"));
}

/// What it would deny is let pass and told, in metrics and to Envoy; the proof of the key is not touched by it.
#[tokio::test(flavor = "multi_thread")]
async fn a_rule_in_shadow_mode_reports_and_denies_nothing() {
    let (stack, key) = restricted(&[("--shadow", "models")]).await;
    let send = async |secret: &str, body: &str| {
        Request::post(CHAT, body).bearer(secret).send(stack.envoy.addr()).await
    };
    assert_eq!(send(&key.secret, r#"{"model":"claude-3"}"#).await.status, 200);
    assert_eq!(send(&key.secret, "no json").await.status, 200);
    assert_eq!(send(&key.secret, r#"{"model":"gpt-4o"}"#).await.status, 200);
    assert_eq!(send(&key.wrong(), r#"{"model":"gpt-4o"}"#).await.status, 401);
    let shadowed =
        async |reason| stack.keyward.count("keyward_shadow_denials_total", &[("reason", reason)]).await;
    assert_eq!((shadowed("model_not_allowed").await, shadowed("ambiguous_request").await), (1, 1));
    let authorizer = Authorizer::connect(stack.keyward.grpc_addr()).await;
    let answer = authorizer.check(Check::new("POST", CHAT).bearer(&key.secret).build(Encoding::Raw)).await;
    assert!(answer.allows());
    assert_eq!(answer.metadata("shadow_reason"), Some("ambiguous_request"));
}
