//! A collector of spans, by OTLP over gRPC and over HTTP, that keeps what it is sent.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use axum::body::Bytes;
use axum::routing::post;
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message;
use tokio::net::TcpListener;
use tonic::{Request, Response, Status};

use super::eventually;

/// Gone with the test's runtime.
#[derive(Clone)]
pub(crate) struct Collector {
    /// With their service.
    spans: Arc<Mutex<Vec<(String, Span)>>>,
    grpc: SocketAddr,
    http: SocketAddr,
}

impl Collector {
    pub(crate) async fn start() -> Self {
        let grpc = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let http = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let collector = Self {
            spans: Arc::default(),
            grpc: grpc.local_addr().unwrap(),
            http: http.local_addr().unwrap(),
        };
        let server =
            tonic::transport::Server::builder().add_service(TraceServiceServer::new(collector.clone()));
        let incoming = tonic::transport::server::TcpIncoming::from(grpc);
        tokio::spawn(server.serve_with_incoming(incoming));
        let own = collector.clone();
        let take = post(move |body: Bytes| async move {
            own.take(ExportTraceServiceRequest::decode(body).unwrap());
        });
        let router = axum::Router::new().route("/v1/traces", take);
        tokio::spawn(async move { axum::serve(http, router).await });
        collector
    }

    pub(crate) fn url(&self, protocol: &str) -> String {
        format!("http://{}", if protocol == "grpc" { self.grpc } else { self.http })
    }

    fn take(&self, request: ExportTraceServiceRequest) {
        for resource in request.resource_spans {
            let mut attributes = resource.resource.into_iter().flat_map(|resource| resource.attributes);
            let service = attributes.find(|attribute| attribute.key == "service.name");
            let service = text(service.and_then(|service| service.value).as_ref());
            let spans = resource.scope_spans.into_iter().flat_map(|scope| scope.spans);
            self.spans.lock().unwrap().extend(spans.map(|span| (service.clone(), span)));
        }
    }

    /// All of Keyward's so far.
    pub(crate) fn spans(&self) -> Vec<Span> {
        self.spans_of("keyward")
    }

    /// All of a service's so far.
    pub(crate) fn spans_of(&self, service: &str) -> Vec<Span> {
        let spans = self.spans.lock().unwrap();
        spans.iter().filter(|(own, _)| own == service).map(|(_, span)| span.clone()).collect()
    }

    /// Where it is asked by gRPC.
    pub(crate) fn grpc_addr(&self) -> SocketAddr {
        self.grpc
    }

    /// The first span that fits.
    pub(crate) async fn span(&self, fits: impl Fn(&Span) -> bool) -> Span {
        let found = eventually(async || self.spans().into_iter().find(|span| fits(span))).await;
        found.unwrap_or_else(|| panic!("no such span: {:#?}", self.spans()))
    }
}

fn text(value: Option<&opentelemetry_proto::tonic::common::v1::AnyValue>) -> String {
    match value.and_then(|value| value.value.as_ref()) {
        Some(Value::StringValue(text)) => text.clone(),
        Some(Value::IntValue(number)) => number.to_string(),
        Some(other) => format!("{other:?}"),
        None => String::new(),
    }
}

/// An attribute as text; empty where it is not there.
pub(crate) fn attribute(span: &Span, name: &str) -> String {
    let found = span.attributes.iter().find(|attribute| attribute.key == name);
    text(found.and_then(|attribute| attribute.value.as_ref()))
}

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        self.take(request.into_inner());
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}
