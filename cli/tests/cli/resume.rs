//! `qlora finetune --resume`: an interrupted run, however often and however interrupted, ends like
//! an uninterrupted one, or says why it can't.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::common::model::path;
use crate::common::run::{Setup, adapter, fail, has_checkpoint, metrics, qlora, signal, succeed, text};
use serde_json::Value;

/// Names in a folder, sorted.
fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Flags for a short run with a checkpoint at every step. None of its learning rates is a round
/// number.
const SHORT: [&str; 16] = [
    "--max-steps",
    "4",
    "--lr",
    "9.426684551178853e-05",
    "--rank",
    "2",
    "--save-every",
    "1",
    "--keep",
    "9",
    "--eval-split",
    "0.2",
    "--eval-every",
    "1",
    "--dropout",
    "0.1",
];

impl Resume<'_> {
    /// The flags of a short run, and others.
    fn with(&self, others: &[&str]) -> Command {
        self.setup.finetune(self.name, &[&SHORT[..], others].concat())
    }

    /// Removes what came after this step's checkpoint, as if the run had been killed then; 0:
    /// before the first checkpoint.
    fn cut_back(&self, step: u32) {
        let folder = self.setup.output(self.name);
        (step + 1..=4).for_each(|later| fs::remove_dir_all(folder.join(format!("checkpoint-{later}"))).unwrap());
        ["adapter_config.json", "adapter_model.safetensors"]
            .iter()
            .for_each(|name| fs::remove_file(folder.join(name)).unwrap());
    }
}

/// A short run in a folder.
struct Resume<'a> {
    setup: &'a Setup,
    name: &'a str,
}

/// Flags for a run of 60 steps that uses everything with state.
const WHOLE: [&str; 14] = [
    "--max-steps",
    "60",
    "--lr",
    "1e-2",
    "--rank",
    "4",
    "--dropout",
    "0.1",
    "--eval-split",
    "0.2",
    "--eval-every",
    "7",
    "--save-every",
    "1",
];

fn metrics_len(folder: &Path) -> usize {
    fs::read(folder.join("metrics.jsonl")).map_or(0, |bytes| bytes.len())
}

#[test]
fn a_run_that_is_killed_again_and_again_ends_as_one_that_is_not() {
    let setup = Setup::new(40);
    succeed(setup.finetune("whole", &WHOLE));
    let (wanted, output) = (setup.output("whole"), setup.output("killed"));

    let mut kills = 0;
    // Time until the next kill. It grows on a busy machine, as long as kills come before a step is
    // done.
    let (mut patience, mut newest) = (10_000, 0);
    let mut arguments = WHOLE.to_vec();
    for attempt in 0.. {
        assert!(attempt < 400, "no progress after {kills} kills");
        // Killed before its first checkpoint, a run starts again with or without the flag.
        arguments.truncate(WHOLE.len());
        if attempt % 2 == 1 || output.exists() && has_checkpoint(&output) {
            arguments.push("--resume");
        }
        let mut child = setup.finetune("killed", &arguments).spawn().unwrap();
        // At any time: in a step, in a checkpoint, or at the start.
        let enough = Duration::from_micros(patience + (attempt * 7919) % 40_000);
        let start = Instant::now();
        while start.elapsed() < enough && child.try_wait().unwrap().is_none() {
            sleep(Duration::from_micros(500));
        }
        if child.try_wait().unwrap().is_none() {
            child.kill().unwrap();
            kills += 1;
        }
        let result = child.wait_with_output().unwrap();
        if let Some(status) = result.status.code() {
            assert_eq!(status, 0, "{}", text(&result.stderr));
            break;
        }
        let before = std::mem::replace(&mut newest, metrics_len(&output));
        patience = if newest > before { patience * 3 / 4 } else { patience * 5 / 4 };
    }
    println!("{kills} kills");
    // As if the run had been killed between the last checkpoint and the adapter.
    fs::remove_file(output.join("adapter_config.json")).unwrap();
    succeed(setup.finetune("killed", &[&WHOLE[..], &["--resume"]].concat()));
    assert!(kills >= 5, "only {kills} kills");
    assert_eq!(metrics(&output), metrics(&wanted));
    assert_eq!(adapter(&output), adapter(&wanted));
    let left = names(&output);
    assert!(!left.iter().any(|name| name.starts_with(".qlora-") || name == "run.lock"), "{left:?}");
}

#[test]
#[cfg(unix)]
fn ctrl_c_saves_and_resume_goes_on_to_the_bit() {
    let setup = Setup::new(40);
    let arguments =
        ["--max-steps", "3000", "--rank", "4", "--save-every", "0", "--early-stop", "1000", "--eval-split", "0.1"];
    let mut child = setup.finetune("run", &[&arguments[..], &["--json"]].concat()).spawn().unwrap();
    let start = Instant::now();
    let output = setup.output("run");
    while !fs::read_to_string(output.join("metrics.jsonl")).is_ok_and(|text| text.lines().count() > 20) {
        assert!(start.elapsed() < Duration::from_secs(60), "no steps");
        assert!(child.try_wait().unwrap().is_none(), "it ended by itself");
        sleep(Duration::from_millis(1));
    }
    signal(&child, "INT");
    let ended = child.wait_with_output().unwrap();
    assert_eq!(ended.status.code(), Some(130), "{}", text(&ended.stderr));
    assert!(text(&ended.stderr).contains("to continue, run the same command with --resume"), "{}", text(&ended.stderr));
    assert!(has_checkpoint(&output) && !output.join("adapter_model.safetensors").exists());
    let report: Value = serde_json::from_slice(&ended.stdout).unwrap();
    assert_eq!(report["end"], "interrupted");
    assert_eq!(report["steps"], metrics(&output).last().unwrap()["step"]);

    succeed(setup.finetune("run", &[&arguments[..], &["--resume"]].concat()));
    succeed(setup.finetune("whole", &arguments));
    assert_eq!(metrics(&output), metrics(&setup.output("whole")));
    assert_eq!(adapter(&output), adapter(&setup.output("whole")));
}

#[test]
fn what_is_not_saved_yet_starts_from_the_beginning() {
    let setup = Setup::new(20);
    let (whole, run) = (setup.output("whole"), setup.output("run"));
    succeed(Resume { setup: &setup, name: "whole" }.with(&["--early-stop", "9"]));
    for (name, flag) in [("nothing", "--resume"), ("run", "--resume"), ("run", "-v")] {
        if name == "run" {
            if run.exists() {
                fs::remove_dir_all(&run).unwrap();
            }
            // Leftovers of a killed run: half a line, the best adapter so far, half a checkpoint,
            // a temporary file.
            fs::create_dir_all(run.join("best")).unwrap();
            fs::create_dir(run.join(".qlora-half")).unwrap();
            fs::write(run.join("metrics.jsonl"), "{\"step\":0,\"eval_loss\":9.0,\"tokens\":0,\"peak_bytes\":1}\n{\"st")
                .unwrap();
            for file in ["best/adapter_config.json", "best/.qlora-a.tmp", ".qlora-b.tmp", "run.lock", ".qlora-half/x"] {
                fs::write(run.join(file), "nonsense").unwrap();
            }
        }
        let output = succeed(Resume { setup: &setup, name }.with(&["--early-stop", "9", flag]));
        assert_eq!(text(&output.stderr).contains("starts from the beginning"), flag == "--resume");
        let run = setup.output(name);
        assert_eq!((metrics(&run), adapter(&run)), (metrics(&whole), adapter(&whole)));
        assert_eq!((names(&run), names(&run.join("best"))), (names(&whole), names(&whole.join("best"))));
    }
    // A checkpoint is never overwritten, nor is another program's adapter.
    assert!(fail(Resume { setup: &setup, name: "run" }.with(&[]), 1).contains("holds another run"));
    let other = setup.output("other");
    fs::create_dir(&other).unwrap();
    fs::copy(whole.join("adapter_model.safetensors"), other.join("adapter_model.safetensors")).unwrap();
    for flag in ["-v", "--resume"] {
        assert!(fail(Resume { setup: &setup, name: "other" }.with(&[flag]), 1).contains("holds an adapter"));
    }
}

#[test]
fn a_run_that_is_finished_gets_what_is_missing_of_its_result() {
    let setup = Setup::new(20);
    let run = Resume { setup: &setup, name: "run" };
    let first = succeed(run.with(&["--json"]));
    let folder = setup.output("run");
    let (plot, before) = (fs::read(folder.join("loss.png")).unwrap(), names(&folder));
    for lost in ["loss.png", "loss.svg", "adapter_model.safetensors", "adapter_config.json"] {
        fs::remove_file(folder.join(lost)).unwrap();
        let again = succeed(run.with(&["--resume", "--json"]));
        assert!(text(&again.stderr).contains("already finished, after 4 steps"), "{}", text(&again.stderr));
        assert_eq!(text(&again.stdout), text(&first.stdout));
    }
    assert_eq!((fs::read(folder.join("loss.png")).unwrap(), names(&folder)), (plot, before));
}

#[test]
fn every_difference_is_named_by_its_flag_or_file() {
    let setup = Setup::new(20);
    let run = Resume { setup: &setup, name: "run" };
    succeed(run.with(&[]));
    run.cut_back(2);
    let before = names(&setup.output("run"));
    let other = setup.output("other.jsonl");
    fs::write(&other, fs::read_to_string(&setup.data).unwrap().replacen("[0", "[1", 1)).unwrap();
    let other = other.to_str().unwrap();
    let changed = |flags: &[&str]| {
        let mut arguments: Vec<String> =
            run.with(&["--resume"]).get_args().map(|a| a.to_str().unwrap().into()).collect();
        for pair in flags.chunks(2) {
            match arguments.iter().position(|argument| argument == pair[0]) {
                Some(at) => arguments[at + 1] = pair[1].to_owned(),
                None => arguments.extend(pair.iter().map(|&flag| flag.to_owned())),
            }
        }
        let mut command = qlora(&[]);
        command.args(arguments);
        fail(command, 1)
    };
    let cases: [(&[&str], &str); 19] = [
        (&["--max-steps", "5"], "steps 4, now 5 (--max-steps, --epochs)"),
        (&["--lr", "9.426684551178857e-05"], "learning rate 0.00009426684551178853, now 0.0000942668455117885"),
        (&["--rank", "4"], "rank 2, now 4 (--rank)"),
        (&["--alpha", "3"], "(--alpha)"),
        (&["--dropout", "0.2"], "(--dropout)"),
        (&["--targets", "q_proj"], "(--targets)"),
        (&["--rslora"], "(--rslora)"),
        (&["--dora"], "(--dora)"),
        (&["--batch-size", "1"], "batch size 2, now 1 (--batch-size)"),
        (&["--grad-accum", "2"], "(--grad-accum)"),
        (&["--no-packing"], "(--no-packing)"),
        (&["--no-shuffle"], "(--no-shuffle)"),
        (&["--schedule", "linear"], "schedule cosine, now linear (--schedule)"),
        (&["--seed", "3"], "(--seed)"),
        (&["--eval-every", "2"], "steps between evaluations 1, now 2 (--eval-every)"),
        (&["--early-stop", "3"], "without --early-stop, so its best adapter was not kept"),
        (&["--base-format", "nf4-plain"], "model formats"),
        (&["--eval-split", "0.4"], "--eval-split"),
        (&["--data", other], "other.jsonl (--data"),
    ];
    for (flags, wanted) in cases {
        let message = changed(flags);
        assert!(
            message.contains(wanted) && message.contains("resume with the original setting"),
            "{flags:?}: {message}"
        );
        assert_eq!(names(&setup.output("run")), before, "{flags:?}");
    }
    // --quiet doesn't affect the run's course.
    succeed(run.with(&["--resume", "--quiet"]));
}

#[test]
fn other_evaluation_data_and_another_patience_are_noticed() {
    let setup = Setup::new(20);
    let eval = setup.output("eval.jsonl");
    fs::write(&eval, "{\"input_ids\": [1, 2, 3]}\n{\"input_ids\": [4, 5, 6]}\n").unwrap();
    let flags = |patience| {
        ["--max-steps", "4", "--eval-data", eval.to_str().unwrap(), "--eval-every", "1", "--early-stop", patience]
            .map(String::from)
    };
    let finetune = |patience, last: &[&str]| {
        let mut command = setup.finetune("run", last);
        command.args(flags(patience));
        command
    };
    succeed(finetune("9", &[]));
    assert!(fail(finetune("8", &["--resume"]), 1).contains("patience of early stopping 9, now 8 (--early-stop)"));
    fs::write(&eval, "{\"input_ids\": [1, 2, 3]}\n{\"input_ids\": [4, 5, 7]}\n").unwrap();
    let message = fail(finetune("9", &["--resume"]), 1);
    assert!(message.contains("other evaluation data") && message.contains("--eval-data"), "{message}");
}

/// The bundled model and text, in their own folder.
fn bundled(folder: &Path) -> Command {
    let model = folder.join("tiny");
    let mut command = qlora(&["finetune", "--device", "cpu", "--model", "tiny", "--data"]);
    if !model.exists() {
        let assets = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets");
        fs::create_dir(&model).unwrap();
        for name in ["config.json", "model.safetensors", "tokenizer.json"] {
            fs::copy(assets.join("tiny-glossary").join(name), model.join(name)).unwrap();
        }
        let text = fs::read_to_string(assets.join("devil_valid.jsonl")).unwrap();
        fs::write(folder.join("text.jsonl"), text.lines().take(4).collect::<Vec<_>>().join("\n")).unwrap();
    }
    command
        .args(["text.jsonl", "--output", "run", "--max-steps", "2", "--seq-len", "16", "--rank", "2"])
        .current_dir(folder);
    command
}

#[test]
fn another_model_under_the_same_name_is_noticed_and_the_same_under_another_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    succeed(bundled(folder));
    fs::remove_file(folder.join("run/adapter_config.json")).unwrap();
    let resume = |model: &str| {
        let mut command = bundled(folder);
        command.arg("--resume");
        let arguments: Vec<_> = command
            .get_args()
            .map(|argument| if argument == "tiny" { model.into() } else { argument.to_owned() })
            .collect();
        let mut command = Command::new(command.get_program());
        command.args(arguments).current_dir(folder).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    };
    succeed(resume("./tiny"));
    succeed(resume(folder.join("tiny").to_str().unwrap()));

    let file = folder.join("tiny/model.safetensors");
    let bytes = fs::read(&file).unwrap();
    let mut changed = bytes.clone();
    // In the middle of the file, among the values.
    changed[bytes.len() / 2] ^= 1;
    fs::write(&file, changed).unwrap();
    let message = fail(resume("tiny"), 1);
    assert!(message.contains("weights other than tiny's (--model)"), "{message}");
    fs::write(&file, bytes).unwrap();

    let config = folder.join("tiny/config.json");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, text.replace("\"max_position_embeddings\": ", "\"max_position_embeddings\": 1")).unwrap();
    assert!(fail(resume("tiny"), 1).contains("started with model llama, 4 layers of 256"), "of other sizes");
    fs::write(&config, text).unwrap();

    fs::write(folder.join("tiny/tokenizer_config.json"), "{\"chat_template\": \"{{ messages }}\"}").unwrap();
    let message = fail(resume("tiny"), 1);
    assert!(message.contains("a tokenizer other than tiny's (--model)"), "{message}");
}

#[test]
fn a_damaged_checkpoint_gives_way_to_the_one_before() {
    let setup = Setup::new(20);
    let (whole, run) = (setup.output("whole"), Resume { setup: &setup, name: "run" });
    succeed(Resume { setup: &setup, name: "whole" }.with(&[]));
    succeed(run.with(&[]));
    let folder = setup.output("run");
    for (round, (file, at)) in
        [("optimizer.safetensors", 999), ("state.json", 30), ("adapter_model.safetensors", 0), ("metrics.jsonl", 3)]
            .into_iter()
            .enumerate()
    {
        if round > 0 {
            fs::remove_dir_all(folder.join("checkpoint-3.damaged")).unwrap();
        }
        run.cut_back(3);
        let path = folder.join("checkpoint-3").join(file);
        let mut bytes = fs::read(&path).unwrap();
        bytes[at] ^= 4;
        if round == 2 {
            fs::remove_file(&path).unwrap();
        } else {
            fs::write(&path, bytes).unwrap();
        }
        let message = text(&succeed(run.with(&["--resume"])).stderr);
        assert!(
            message.contains("warning: ") && message.contains(&format!("checkpoint-3/{file} is damaged")),
            "{message}"
        );
        assert!(message.contains("continuing from") && folder.join("checkpoint-3.damaged").exists(), "{message}");
        assert_eq!((metrics(&folder), adapter(&folder)), (metrics(&whole), adapter(&whole)), "{file}");
    }
    for step in 1..=4 {
        fs::write(folder.join(format!("checkpoint-{step}/state.json")), "{}").unwrap();
    }
    let before = names(&folder);
    let message = fail(run.with(&["--resume"]), 1);
    assert!(
        message.contains("no intact checkpoint is left") && message.contains("checkpoint-4/state.json"),
        "{message}"
    );
    assert_eq!(names(&folder), before);
}

#[test]
fn metrics_with_a_hole_are_completed() {
    let setup = Setup::new(20);
    let (whole, run) = (setup.output("whole"), Resume { setup: &setup, name: "run" });
    succeed(Resume { setup: &setup, name: "whole" }.with(&[]));
    succeed(run.with(&[]));
    run.cut_back(2);
    let path = setup.output("run").join("metrics.jsonl");
    let lines = fs::read_to_string(&path).unwrap();
    fs::write(&path, lines.split_inclusive('\n').filter(|line| !line.contains("\"step\":1,")).collect::<String>())
        .unwrap();
    let message = text(&succeed(run.with(&["--resume"])).stderr);
    assert!(
        message.contains("metrics.jsonl: lines were missing or changed; those up to step 2 were restored from"),
        "{message}"
    );
    assert_eq!(metrics(&setup.output("run")), metrics(&whole));
}

/// Starts a run of many steps and waits until it has done some.
fn long_run(setup: &Setup, mut command: Command) -> Child {
    let mut child = command.spawn().unwrap();
    let start = Instant::now();
    while !fs::read_to_string(setup.output("run/metrics.jsonl")).is_ok_and(|text| text.lines().count() > 5) {
        assert!(start.elapsed() < Duration::from_secs(60), "no steps");
        assert!(child.try_wait().unwrap().is_none(), "it ended by itself");
        sleep(Duration::from_millis(1));
    }
    child
}

const LONG: [&str; 4] = ["--max-steps", "100000", "--save-every", "1"];

#[test]
#[cfg(unix)]
fn a_second_run_in_the_folder_of_a_live_one_is_refused() {
    let setup = Setup::new(20);
    let child = long_run(&setup, setup.finetune("run", &LONG));
    for flags in [&LONG[..], &[&LONG[..], &["--resume"]].concat()] {
        let message = fail(setup.finetune("run", flags), 1);
        assert!(
            message.contains("in use by a running process: process ") && message.contains(&child.id().to_string()),
            "{message}"
        );
    }
    signal(&child, "INT");
    let ended = child.wait_with_output().unwrap();
    assert_eq!(ended.status.code(), Some(130), "{}", text(&ended.stderr));
    let saved = metrics(&setup.output("run"));
    assert!(saved.iter().zip(1..).all(|(record, step)| record["step"] == step) && saved.len() > 5);
}

#[test]
#[cfg(unix)]
fn a_hangup_ends_a_run_unless_it_is_ignored() {
    let setup = Setup::new(20);
    // If these tests run under nohup, their children inherit it.
    let inherited = Command::new("sh").args(["-c", "kill -HUP $$"]).status().unwrap().success();
    for (ignored, trap) in [(true, "trap '' HUP; "), (inherited, "")] {
        let finetune = setup.finetune("run", &LONG);
        let mut command = Command::new("sh");
        command
            .args(["-c", &format!("{trap}exec \"$0\" \"$@\"")])
            .arg(finetune.get_program())
            .args(finetune.get_args());
        let mut child = long_run(&setup, command);
        signal(&child, "HUP");
        if ignored {
            sleep(Duration::from_millis(300));
            assert!(child.try_wait().unwrap().is_none(), "the hangup has ended it");
            signal(&child, "TERM");
        }
        assert_eq!(child.wait().unwrap().code(), Some(130));
        assert!(has_checkpoint(&setup.output("run")));
        fs::remove_dir_all(setup.output("run")).unwrap();
    }
}

#[test]
fn a_batch_that_does_not_fit_is_refused_with_one_that_does() {
    let setup = Setup::new(200);
    let plan = |flags: &[&str]| {
        let mut command = qlora(&["plan", "--device", "cpu", "--model"]);
        command.arg(path("llama")).args(["--seq-len", "16"]).args(flags);
        command
    };
    let bytes = |rows: &str| {
        let found: Value = serde_json::from_slice(
            &succeed(plan(&["--batch-size", rows, "--grad-accum", "2", "--json", "--memory", "1TiB"])).stdout,
        )
        .unwrap();
        found["held_bytes"].as_u64().unwrap()
    };
    // Room for 16 rows, not for 32.
    let memory = (bytes("16") * 10 / 9 + 1000).to_string();
    assert!(bytes("32") > bytes("16") + 1000);
    let flags = ["--memory", &memory, "--batch-size", "64", "--grad-accum", "2"];
    let output = plan(&[&flags[..], &["--json"]].concat()).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(serde_json::from_slice::<Value>(&output.stdout).unwrap()["fits"], false);
    let offer = "--batch-size 16 fits; add --grad-accum 8 for as many rows per step";
    assert!(text(&output.stderr).contains(offer), "{}", text(&output.stderr));
    let finetune = |rows, memory: &str| {
        let mut command = qlora(&["finetune", "--device", "cpu", "--model"]);
        command.arg(path("llama")).arg("--data").arg(&setup.data).arg("--output").arg(setup.output("run"));
        command.args([
            "--seq-len",
            "16",
            "--no-packing",
            "--max-steps",
            "1",
            "--grad-accum",
            "2",
            "--batch-size",
            rows,
            "--memory",
            memory,
        ]);
        command
    };
    let message = fail(finetune("64", &memory), 1);
    assert!(message.contains(offer) && !setup.output("run").exists(), "{message}");
    let message = fail(finetune("64", "1KiB"), 1);
    assert!(message.contains("--checkpoint-activations or a shorter --seq-len"), "{message}");
    succeed(finetune("16", &memory));
}

/// Files over 8 KiB can't be written, as on a full disk.
#[test]
#[cfg(unix)]
fn a_full_disk_is_an_error_and_leaves_no_half_checkpoint() {
    let setup = Setup::new(10);
    let finetune = setup.finetune("run", &["--max-steps", "2"]);
    let mut command = Command::new("sh");
    // With the signal ignored, the write fails.
    command.args(["-c", "trap '' XFSZ; ulimit -f 16; exec \"$0\" \"$@\""]).arg(finetune.get_program());
    command.args(finetune.get_args()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let message = fail(command, 1);
    assert!(message.contains("checkpoint-2"), "{message}");
    assert_eq!(names(&setup.output("run")), ["metrics.jsonl"]);
}
