//! Bodies at random: what they ask for, and the bytes.

use super::generate::{MODELS, Random, quoted};

/// What a body means.
#[derive(Debug)]
pub(super) enum Asked {
    /// There is none.
    Nothing,
    /// Exactly these models.
    For(Vec<&'static str>),
    /// No main model, and these to fall back to.
    OnlyFallbacks(Vec<&'static str>),
    /// The main model is named more than once, or in a spelling that only some readers take for it.
    Twice,
    /// Nobody can say.
    Unclear,
}

/// A body as Envoy hands it over.
#[derive(Debug)]
pub(super) struct Written {
    pub(super) asked: Asked,
    pub(super) bytes: Option<Vec<u8>>,
    pub(super) is_whole: bool,
    pub(super) encoding: &'static str,
    pub(super) content_type: &'static str,
}

impl Written {
    pub(super) fn at_random(random: &mut Random) -> Self {
        let content_type =
            random.pick(&["", "application/json", "text/plain", "Application/JSON; charset=utf-8"]);
        let (asked, text) = match random.below(20) {
            0..5 => return Self::nothing(content_type),
            5 => (Asked::Twice, twice(random)),
            6 => (Asked::Unclear, unclear(random)),
            7 | 8 => {
                let (fields, fallbacks) = others(random);
                (Asked::OnlyFallbacks(fallbacks), object(fields, random))
            }
            _ => {
                let model = random.pick(&MODELS);
                let (mut fields, fallbacks) = others(random);
                fields.push(format!("{}:{}", quoted("model", random), quoted(model, random)));
                let named = [model].into_iter().chain(fallbacks).collect();
                (Asked::For(named), object(fields, random))
            }
        };
        let mut written = Self {
            asked,
            bytes: Some(text.into_bytes()),
            is_whole: true,
            encoding: random.pick(&["", "", "identity", "Identity"]),
            content_type,
        };
        written.spoil(random);
        written
    }

    fn nothing(content_type: &'static str) -> Self {
        Self { asked: Asked::Nothing, bytes: None, is_whole: true, encoding: "", content_type }
    }

    /// Seldom: makes it so that nobody can read it.
    fn spoil(&mut self, random: &mut Random) {
        match random.below(60) {
            0 => self.is_whole = false,
            1 => self.encoding = random.pick(&["gzip", "br", "identity, gzip", "?"]),
            // A form where the path takes none.
            2 => self.content_type = "multipart/form-data; boundary=b",
            3 => self.bytes.get_or_insert_default().push(b'\xff'),
            _ => return,
        }
        self.asked = Asked::Unclear;
    }
}

/// Fields that say nothing about the main model, and the models to fall back to.
fn others(random: &mut Random) -> (Vec<String>, Vec<&'static str>) {
    let noise = [
        r#""stream":true"#,
        r#""temperature":-1.5e-3"#,
        r#""messages":[{"role":"user","content":"\"model\":\"evil\"}"}]"#,
        r#""metadata":{"model":"evil","models":["evil"]}"#,
        r#""modell":"evil""#,
        r#""":null"#,
        r#""model ":"evil""#,
    ];
    let mut fields: Vec<String> = (0..random.below(3)).map(|_| random.pick(&noise).to_owned()).collect();
    let mut fallbacks = Vec::new();
    for name in ["models", "fallbacks"] {
        if random.one_in(8) {
            let models: Vec<&str> = (0..random.below(3)).map(|_| random.pick(&MODELS)).collect();
            let list: Vec<String> = models.iter().map(|model| quoted(model, random)).collect();
            fields.push(format!("{}:[{}]", quoted(name, random), list.join(",")));
            fallbacks.extend(models);
        }
    }
    (fields, fallbacks)
}

fn twice(random: &mut Random) -> String {
    let other = random.pick(&["model", "Model", "MODEL", "m\u{6f}del"]);
    let mut fields = vec![format!("{}:{}", quoted(other, random), quoted("gpt-4o", random))];
    if other == "model" || random.one_in(2) {
        fields.push(format!("\"model\":{}", quoted("gpt-4o", random)));
    }
    object(fields, random)
}

fn unclear(random: &mut Random) -> String {
    let deep = format!("{{\"model\":\"gpt-4o\",\"a\":{}{}}}", "[".repeat(200), "]".repeat(200));
    let texts = [
        r#"{"model":"gpt-4o"}{"model":"gpt-4o"}"#,
        r#"{"model":"gpt-4o"} x"#,
        r#"{"model":"gpt-4o""#,
        r#"{"model":"gpt-4o",}"#,
        r#"["model","gpt-4o"]"#,
        r#"{"model":["gpt-4o"]}"#,
        r#"{"model":null}"#,
        r#"{"model":"gpt-4o","models":"gpt-4o"}"#,
        r#"{"model":"gpt-4o","fallbacks":[1]}"#,
        r"{'model':'gpt-4o'}",
        "\u{feff}{\"model\":\"gpt-4o\"}",
        "model=gpt-4o",
        &deep,
    ];
    random.pick(&texts).to_owned()
}

fn object(mut fields: Vec<String>, random: &mut Random) -> String {
    for last in (1..fields.len()).rev() {
        fields.swap(last, random.below(last + 1));
    }
    let (before, between) = (random.pick(&["", "\n "]), random.pick(&[",", " ,\r\n\t"]));
    format!("{before}{{{}}}{before}", fields.join(between))
}
