//! `qlora data`, and data from pipes.

use std::path::Path;

use assert_cmd::Command;
use serde_json::{Value, json};

fn qlora(arguments: &[&str], input: &str) -> Command {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/tiny-glossary");
    let mut qlora = Command::cargo_bin("qlora").unwrap();
    qlora.args(arguments).arg("--model").arg(model).env("QLORA_TUNE", "0").write_stdin(input.to_owned());
    qlora
}

/// Standard output and standard error of a run that ends with this status.
fn run(arguments: &[&str], input: &str, code: i32) -> [String; 2] {
    let output = qlora(arguments, input).assert().code(code).get_output().clone();
    [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap())
}

const LINES: &str = "\u{feff}{\"prompt\": \"What is\\nit?\", \"completion\": \" A \\u001b cat.\", \"id\": 3}\r\n\
    {\"text\": \"hello there\"}\r\n{\r\n";

#[test]
fn the_tokens_that_carry_loss_are_marked() {
    let [shown, said] = run(&["data", "-", "--skip-bad-lines"], LINES, 0);
    assert!(shown.contains("JSON Lines, 2 examples"), "{shown}");
    assert!(shown.contains("\nWhat is\\nit?⟦ A \\u{1b} cat."), "{shown}");
    assert!(said.contains("left out 1 bad lines") && said.contains("id (1)"), "{said}");

    let [colored, _] = run(&["--color", "always", "data", "-", "--skip-bad-lines", "--example", "1"], LINES, 0);
    assert!(colored.contains("What is\\n\nit?\u{1b}[") && !colored.contains(['⟦', '⟧']), "{colored:?}");
    assert!(!colored.contains("hello"), "{colored}");

    let [json, _] = run(&["data", "-", "--skip-bad-lines", "--json", "--limit", "1"], LINES, 0);
    let report: Value = serde_json::from_str(&json).unwrap();
    let of = |key: &str| report[key].clone();
    assert_eq!((of("format"), of("examples"), of("bad_lines")), (json!("JSON Lines"), json!(2), json!(1)));
    assert_eq!((of("passed_over"), report["shown"].as_array().unwrap().len()), (json!({"id": 1}), 1));
    let shown = &report["shown"][0];
    assert_eq!(shown["parts"][0], json!({"text": "What is\nit?", "loss": false}));
    let labels = shown["labels"].as_array().unwrap();
    assert_eq!(json!(labels.iter().filter(|label| **label != -100).count()), shown["label_tokens"]);
    assert_eq!(shown["ids"].as_array().unwrap().len(), labels.len());

    let [_, error] = run(&["data", "-", "--skip-bad-lines", "--example", "3"], LINES, 1);
    assert!(error.contains("--example is 3; there are 2"), "{error}");
}

#[test]
fn standard_input_is_read_once() {
    let [marked, _] = run(&["data", "-", "--skip-bad-lines", "--json", "--limit", "0"], LINES, 0);
    let marked: Value = serde_json::from_str(&marked).unwrap();
    let [found, _] = run(&["eval", "--device", "cpu", "--data", "-", "--skip-bad-lines", "--json"], LINES, 0);
    let found: Value = serde_json::from_str(&found).unwrap();
    assert_eq!(found["tokens"], marked["label_tokens"]);
    run(&["plan", "--device", "cpu", "--data", "-", "--skip-bad-lines", "--memory", "8GiB"], LINES, 0);
    let [_, error] = run(&["plan", "--device", "cpu", "--data", "-", "--eval-data", "-"], LINES, 1);
    assert!(error.contains("standard input can be read only once"), "{error}");
}
