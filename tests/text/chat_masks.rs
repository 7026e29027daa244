//! Chats in the templates of well-known models: the text equals that of transformers, and only
//! answers carry loss.
//!
//! `golden/chat/cases.json` has templates in the style of those models, conversations, the output
//! of transformers 5.24 for them, and the parts that carry loss.

use std::fs;
use std::path::Path;

use qlora_wgpu::text::{ChatTemplate, Conversation, Message, Tokenizer};
use qlora_wgpu::train::data::{DataOptions, Dataset};
use serde_json::{Value, json};
use tempfile::TempDir;

const GOLDEN: &str = include_str!("../golden/chat/cases.json");

/// A tokenizer with this chat template. Every word in angle brackets is a special token, `</s>`
/// the end token.
fn tokenizer(template: &str, texts: &[&str]) -> Tokenizer {
    let folder = TempDir::new().unwrap();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tokenizer/tiny.json");
    let mut tiny: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    let mut names = vec!["<s>", "</s>"];
    for (at, text) in texts.iter().flat_map(|text| text.match_indices('<').map(move |(at, _)| (at, text))) {
        let end = text[at..].find('>').map(|end| &text[at..=at + end]);
        let name = end.filter(|name| !name[1..].contains('<') && !name.contains([' ', '\n']));
        names.extend(name.filter(|name| !names.contains(name)));
    }
    for (id, name) in (2048..).zip(&names) {
        let mut token = tiny["added_tokens"][0].clone();
        token["id"] = json!(id);
        token["content"] = json!(name);
        tiny["added_tokens"].as_array_mut().unwrap().push(token);
    }
    let config = json!({"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": true, "chat_template": template});
    fs::write(folder.path().join("tokenizer.json"), tiny.to_string()).unwrap();
    fs::write(folder.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    Tokenizer::from_dir(folder.path()).unwrap()
}

/// Returns the runs that carry loss in a line with this conversation, or the error.
fn loss(tokenizer: &Tokenizer, line: &Value) -> Result<Vec<String>, String> {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("a.jsonl");
    fs::write(&path, line.to_string()).unwrap();
    let read = Dataset::read(&path, Ok(tokenizer), &DataOptions::default()).map_err(|e| e.to_string())?;
    let example = &read.examples[0];
    let mut runs: Vec<Vec<u32>> = vec![Vec::new()];
    for (&id, label) in example.ids().iter().zip(example.labels()) {
        if label == -100 { runs.push(Vec::new()) } else { runs.last_mut().unwrap().push(id) }
    }
    Ok(runs.iter().filter(|run| !run.is_empty()).map(|run| tokenizer.decode(run, false).unwrap()).collect())
}

fn conversation(chat: &Value) -> Conversation {
    let given = |name: &str| Some(chat[name].clone()).filter(|value| !value.is_null());
    Conversation {
        messages: Message::list(&chat["messages"]).unwrap(),
        tools: given("tools"),
        documents: None,
        variables: chat["kw"].as_object().cloned().unwrap_or_default(),
    }
}

#[test]
fn texts_are_those_of_transformers() {
    let golden: Value = serde_json::from_str(GOLDEN).unwrap();
    for case in golden["cases"].as_array().unwrap() {
        let [template, chat] = ["template", "chat"].map(|key| case[key].as_str().unwrap());
        let source = golden["templates"][template].as_str().unwrap();
        let chat = conversation(&golden["chats"][chat]);
        let text = ChatTemplate::new(source).unwrap().render(&chat, case["prompt"] == true, "<s>", "</s>");
        assert_eq!(text.ok().as_deref(), case["text"].as_str(), "{template}, {}", case["chat"]);
    }
}

#[test]
fn answers_carry_loss_in_every_template() {
    let golden: Value = serde_json::from_str(GOLDEN).unwrap();
    for (template, source) in golden["templates"].as_object().unwrap() {
        let of = |key: &str| golden[key].as_array().unwrap().iter().filter(|case| case["template"] == *template);
        let texts: Vec<&str> = of("cases").filter_map(|case| case["text"].as_str()).collect();
        let tokenizer = tokenizer(source.as_str().unwrap(), &texts);
        // Lines have no variables. Only the library supports them, through `Conversation`.
        for case in of("masks").filter(|case| case["chat"] != "nothink") {
            let found = loss(&tokenizer, &golden["chats"][case["chat"].as_str().unwrap()]);
            match (&found, &case["loss"]) {
                (Ok(found), Value::Array(wanted)) => {
                    assert_eq!(json!(found), json!(wanted), "{template}, {}", case["chat"])
                }
                (Err(found), Value::Null) => {
                    let wanted = case["error"].as_str().unwrap();
                    assert!(found.contains(wanted), "{template}, {}: {found}, not {wanted}", case["chat"]);
                }
                _ => panic!("{template}, {}: {found:?}", case["chat"]),
            }
        }
    }
}

const PLAIN: &str = "{% for m in messages %}{% if m.role == 'user' %}Question: {{ m.content }}\n{% else %}### The answer is:\n\
                     {{ m.content }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}### The answer is:\n{% else %}\
                     {{ eos_token }}{% endif %}";
const ROLES: &str = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}\n{% endfor %}\
                     {% if add_generation_prompt %}<assistant>{% endif %}";

fn turns(turns: &[(&str, &str)]) -> Value {
    let messages: Vec<_> = turns.iter().map(|(role, content)| json!({"role": role, "content": content})).collect();
    json!({"messages": messages})
}

#[test]
fn the_users_words_never_carry_loss() {
    let chat = turns(&[("user", "one"), ("assistant", "four"), ("user", "five"), ("assistant", "eleven")]);
    let check = |template: &str, wanted: &[&str]| {
        assert_eq!(loss(&tokenizer(template, &[]), &chat).unwrap(), wanted, "{template}");
    };
    // Turns end in plain text, and the end token comes once.
    check(PLAIN, &["four\n", "eleven\n</s>"]);
    check(ROLES, &["four</s>", "eleven</s>"]);
    // The end token comes with the next turn.
    let late = "{% for m in messages %}{% if not loop.first %}</s>{% endif %}[{{ m.role }}]{{ m.content }}{% endfor %}\
                {% if add_generation_prompt %}</s>[assistant]{% else %}</s>{% endif %}";
    check(late, &["four</s>", "eleven</s>"]);
    // The text before an answer may depend on what follows.
    check("{{ messages | length }}{% for m in messages %}{{ m.content }}</s>{% endfor %}", &["four</s>", "eleven</s>"]);
    // Indexes messages by number, in a macro, and builds new ones.
    check(
        "{% for i in range(messages | length) %}{% set m = messages[i] %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}\
         {% if add_generation_prompt %}[assistant]{% endif %}",
        &["four</s>", "eleven</s>"],
    );
    check(
        "{% macro turn(m) %}[{{ m.role }}]{{ m.content }}</s>{% endmacro %}{% for m in messages %}{{ turn(m) }}{% endfor %}\
         {% if add_generation_prompt %}[assistant]{% endif %}",
        &["four</s>", "eleven</s>"],
    );
    check(
        "{% set ns = namespace(all=[]) %}{% for m in messages %}{% set ns.all = ns.all + [{'role': m.role, 'content': m.content}] %}\
         {% endfor %}{% for m in ns.all %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}",
        &["four</s>", "eleven</s>"],
    );
    // An inner loop over the messages to come.
    check(
        "{% for m in messages %}[{{ m.role }}]{% for later in messages[loop.index:] %}{% endfor %}{{ m.content }}</s>{% endfor %}\
         {% if add_generation_prompt %}[assistant]{% endif %}",
        &["four</s>", "eleven</s>"],
    );

    let refused = |template: &str, wanted: &str| {
        let error = loss(&tokenizer(template, &[]), &chat).unwrap_err();
        assert!(error.contains(wanted), "{template}: {error}");
    };
    refused("{{ messages[0].content }}{{ messages[1].content }}</s>", "message 2: can't be found");
    refused(
        "{% set all %}{% for m in messages %}{{ m.content }}{% endfor %}{% endset %}{{ all }}",
        "message 2: can't be found",
    );
    refused(
        "{% for i in range(0, 4, 2) %}{% set q = messages[i] %}{% set a = messages[i + 1] %}{{ q.content }}{{ a.content }}{% endfor %}",
        "can't be told apart",
    );
}

#[test]
fn generation_blocks_say_what_carries_loss() {
    let chat = turns(&[("user", "hi"), ("assistant", "first"), ("user", "again"), ("assistant", "good")]);
    let template = "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' and loop.last %}{% generation %}{{ m.content }}\
                    {{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}";
    let last = tokenizer(template, &[]);
    assert_eq!(loss(&last, &chat).unwrap(), ["good</s>"]);
    let without_end = "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{%- generation -%} {{ m.content }} \
                       {%- endgeneration -%} {% else %}{{ m.content }}{% endif %}{{ eos_token }}{% endfor %}";
    let mut weighted = chat.clone();
    assert_eq!(loss(&tokenizer(without_end, &[]), &chat).unwrap(), ["first", "good"]);
    weighted["messages"][1]["weight"] = json!(0);
    assert_eq!(loss(&tokenizer(without_end, &[]), &weighted).unwrap(), ["good"]);
}

#[test]
fn weights_are_0_or_1() {
    let tokenizer = tokenizer(ROLES, &[]);
    let mut chat = turns(&[("user", "hi"), ("assistant", "bad"), ("user", "again"), ("assistant", "good")]);
    chat["messages"][1]["weight"] = json!(0);
    chat["messages"][3]["weight"] = json!(1);
    assert_eq!(loss(&tokenizer, &chat).unwrap(), ["good</s>"]);
    chat["messages"][3]["weight"] = json!(0.0);
    assert!(loss(&tokenizer, &chat).unwrap_err().contains("no token carries loss"));
    for (at, field, value, wanted) in [
        (1, "weight", json!(0.5), "message 2: `weight` is 0.5; it must be 0 or 1"),
        (1, "weight", json!("1"), "message 2: `weight` is \"1\""),
        (1, "weight", json!(true), "message 2: `weight` is true"),
        (2, "weight", json!(1), "message 3: `weight` is 1, but only the assistant's messages"),
        (1, "train", json!(false), "`train` of message 2 would be lost"),
        (1, "tool_calls", json!([{"name": "f"}]), "`tool_calls` of message 2 would be lost"),
        (1, "content", json!(null), "message 2: the chat template writes `content`, which is null"),
        (
            0,
            "content",
            json!([{"type": "text", "text": "hi"}]),
            "message 1: the chat template takes `content` as a text only",
        ),
        (0, "content", json!(1), "message 1: `content` is neither"),
    ] {
        let mut other = turns(&[("user", "hi"), ("assistant", "bad"), ("user", "again"), ("assistant", "good")]);
        other["messages"][at][field] = value;
        let error = loss(&tokenizer, &other).unwrap_err();
        assert!(error.contains(wanted), "{error}");
    }
}

#[test]
fn roles_are_as_people_write_them() {
    let tokenizer = tokenizer(ROLES, &[]);
    for (user, assistant) in [("human", "gpt"), ("User", "Assistant"), ("USER", "model"), ("user", "bot")] {
        let chat = turns(&[(user, "hi"), (assistant, "yo")]);
        assert_eq!(loss(&tokenizer, &chat).unwrap(), ["yo</s>"], "{user} {assistant}");
    }
    let template = ChatTemplate::new("{% for m in messages %}{{ m.role }} {% endfor %}").unwrap();
    let roles = Conversation::from(["Human", "gpt", "tool", "Critic"].map(|role| Message::new(role, "")).to_vec());
    assert_eq!(template.render(&roles, false, "", "").unwrap(), "user assistant tool Critic ");
    let own = ChatTemplate::new("{% for m in messages %}{% if m.role == 'human' %}H{% endif %}{% endfor %}").unwrap();
    assert_eq!(own.render(&roles, false, "", "").unwrap(), "");
    let lower = Conversation::from(vec![Message::new("human", "")]);
    assert_eq!(own.render(&lower, false, "", "").unwrap(), "H");

    let silent = "{% for m in messages %}{% if m.role == 'user' or m.role == 'assistant' %}{{ m.content }}</s>{% endif %}{% endfor %}";
    let chat = turns(&[("critic", "hm"), ("user", "hi"), ("assistant", "yo")]);
    let error = loss(&self::tokenizer(silent, &[]), &chat).unwrap_err();
    assert!(error.contains("message 1: the chat template doesn't support the role \"critic\""), "{error}");
}

#[test]
fn a_long_chat_takes_no_longer_than_its_text() {
    let turns: Vec<_> = (0..2000).map(|at| (["user", "assistant"][at % 2], "some words of this turn")).collect();
    let started = std::time::Instant::now();
    assert_eq!(loss(&tokenizer(ROLES, &[]), &self::turns(&turns)).unwrap().len(), 1000);
    assert!(started.elapsed().as_secs() < 10, "{:?}", started.elapsed());
}

#[test]
fn answers_are_found_where_headers_are_odd() {
    let system = "<|im_end|>";
    // The first turn begins with the begin token, which shares its first letters with the header.
    let llama = "{% for m in messages %}{% set c = '<|head|>' + m.role + '<|end|>' + m.content | trim + '<|eot|>' %}\
        {% if loop.index0 == 0 %}{% set c = '<|bot|>' + c %}{% endif %}{{ c }}{% endfor %}\
        {% if add_generation_prompt %}<|head|>assistant<|end|>{% endif %}";
    let separated = "{% for m in messages %}{% if not loop.first %}<|im_end|>\n{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}\
        {% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    let running = "{% for m in messages %}{% if m.role == 'assistant' %}{% if loop.index0 and messages[loop.index0 - 1].role \
        != 'assistant' %}Assistant:{% endif %} {{ m.content }}<|im_end|>{% else %}User: {{ m.content }}\n{% endif %}{% endfor %}\
        {% if add_generation_prompt %}Assistant:{% endif %}";
    let texts = [llama, separated, running, system];
    let first = turns(&[("assistant", "first"), ("user", "hi"), ("assistant", "last")]);
    assert_eq!(loss(&tokenizer(llama, &texts), &first).unwrap(), ["first<|eot|>", "last<|eot|>"]);
    let two = turns(&[("user", "hi"), ("assistant", "yo"), ("user", "x"), ("assistant", "z")]);
    let found = loss(&tokenizer(separated, &texts), &two).unwrap();
    assert!(found.len() == 2 && found[0].starts_with("yo") && found[1].starts_with('z'), "{found:?}");
    let quoting = turns(&[("user", "hi"), ("assistant", "one"), ("assistant", "He wrote Assistant: two")]);
    assert_eq!(
        loss(&tokenizer(running, &texts), &quoting).unwrap().concat(),
        " one<|im_end|> He wrote Assistant: two<|im_end|>"
    );
}

#[test]
fn what_would_be_learned_or_lost_by_mistake_is_named() {
    let inside = "{% for m in messages %}{% if m.role == 'assistant' %}Q: {{ messages[loop.index0 - 1].content }}\nA: \
        {{ m.content }}</s>{% endif %}{% endfor %}";
    let pending = "{% set ns = namespace(q='') %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.q = m.content %}{% else %}\
        [INST] {{ ns.q }} [/INST] {{ m.content }}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}[INST] {{ ns.q }} [/INST]{% endif %}";
    let documents =
        "{% for d in documents %}{{ d.text }}{% endfor %}{% for m in messages %}{{ m.content }}</s>{% endfor %}";
    let outside = "{% set last = messages[-1] %}{% generation %}{{ last.content }}</s>{% endgeneration %}{{ messages[0].content }}";
    let two = turns(&[("user", "question one"), ("assistant", "yo"), ("user", "question two"), ("assistant", "zz")]);
    for (template, line, wanted) in [
        (inside, two.clone(), "writes message 1 together with it"),
        (pending, two.clone(), "writes message 3 together with it"),
        (
            documents,
            json!({"messages": two["messages"], "documents": [{"text": "DOC", "role": "assistant"}]}),
            "has the key `role`",
        ),
        (
            outside,
            json!({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo", "weight": 0}]}),
            "outside of all loops",
        ),
    ] {
        let error = loss(&tokenizer(template, &[template]), &line).unwrap_err();
        assert!(error.contains(wanted), "{template}: {error}");
    }
}
