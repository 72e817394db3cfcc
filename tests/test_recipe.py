"""The recipe: what is read, what is refused and in which words."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from mlx_zh.errors import RecipeError
from mlx_zh.recipe import Recipe, load_recipe
from mlx_zh.recipe_text.problems import keys_of, other_name

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = sorted((ROOT / "recipes").glob("*.yaml"))
BASE = "name: x\nmodel: {path: m}\n"  # what follows begins on line 3


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch) -> None:
    """So that messages name r.yaml without a folder, and no file of the checkout is found by accident."""
    monkeypatch.chdir(tmp_path)


def read(text: str | bytes, *overrides: str) -> Recipe:
    Path("r.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_recipe("r.yaml", overrides)


def refusal(text: str | bytes, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        read(text, *overrides)
    return str(caught.value)


# Keys


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sft: {learning_rat: 1}", "r.yaml:3: sft.learning_rat is not a key; did you mean sft.learning_rate?"),
        ("learning_rate: 1", "r.yaml:3: learning_rate is not a key; did you mean sft.learning_rate?"),
        ("sft:\n  rank: 3", "r.yaml:4: sft.rank is not a key; did you mean lora.rank?"),
        ("modle: {path: y}", "r.yaml:3: modle is not a key; did you mean model?"),
        (
            "data: {sft: {train: [{path: a}, {path: b, formt: c}]}}",
            "r.yaml:3: data.sft.train[1].formt is not a key; did you mean data.sft.train.format?",
        ),
        (
            "memory: {cells: 3}",
            "r.yaml:3: memory.cells is not a key; memory has: micro_tokens, checkpoint_layers, limit, logit_rows, "
            "dense_products.",
        ),
        ("sft: {1: 3}", "r.yaml:3: keys are text, found 1."),
        ("name: y", "r.yaml:3: name is given twice (first on line 1)."),
        ("model:\n  path: y", "r.yaml:3: model is given twice (first on line 2)."),
        ("sft: {epochs: 1, epochs: 2}", "r.yaml:3: sft.epochs is given twice (first on line 3)."),
    ],
)
def test_a_wrong_key_is_named_with_its_line_and_the_nearest_valid_one(text, expected):
    assert refusal(BASE + text) == expected


def test_what_is_missing_is_named():
    assert refusal("seed: 1") == "r.yaml: model is missing.\nr.yaml: name is missing."
    assert refusal("name: x\nmodel: {hub: modelscope}") == "r.yaml:2: model.path is missing."


# Values


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sft: {batch_size: ten}", "sft.batch_size must be a whole number, found 'ten'."),
        ("sft: {batch_size: 2.5}", "sft.batch_size must be a whole number, found 2.5."),
        ("sft: {batch_size: true}", "sft.batch_size must be something other than true or false, found true."),
        ("sft: {batch_size: 0}", "sft.batch_size must be greater than 0, found 0."),
        ("sft: {learning_rate: [1]}", "sft.learning_rate must be a number, found a list."),
        ("sft: {learning_rate: -1e-4}", "sft.learning_rate must be greater than 0, found -0.0001."),
        ("sft: {learning_rate: 1e999}", "sft.learning_rate must be a finite number, found inf."),
        ("sft: {warmup_ratio: 1.5}", "sft.warmup_ratio must be less than or equal to 1, found 1.5."),
        (
            "sft: {lr_scheduler: cosin}",
            "sft.lr_scheduler must be one of 'cosine', 'linear', 'constant', found 'cosin'.",
        ),
        ("sft: {load_best: maybe}", "sft.load_best must be true or false, found 'maybe'."),
        ("sft: {load_best: []}", "sft.load_best must be true or false, found an empty list."),
        ("sft: 3", "sft must be a section with keys of its own, found 3."),
        ("sft:", "sft must be a section with keys of its own, found nothing."),
        ("lora: {num_layers: some}", "lora.num_layers must be either 'all' or a whole number, found 'some'."),
        ("lora: {num_layers: 0}", "lora.num_layers must be either 'all' or greater than 0, found 0."),
        ("lora: {targets: q_proj}", "lora.targets must be either 'all' or a list, found 'q_proj'."),
        (
            "lora: {targets: []}",
            "lora.targets must be either 'all' or a list that is not empty, found an empty list.",
        ),
        ("lora: {targets: [q_proj, 7]}", "lora.targets[1] must be text, found 7."),
        ("lora: {dropout: 1}", "lora.dropout must be less than 1, found 1."),
        ("data: {sft: {train: a.jsonl}}", "data.sft.train must be a list, found 'a.jsonl'."),
        ("data: {sft: {train: [3]}}", "data.sft.train[0] must be a section with keys of its own, found 3."),
        ("data: {sft: {train: ['']}}", "data.sft.train[0] must be text that is not empty, found ''."),
        ("data: {sft: {train: [{name: a, subset: 3}]}}", "data.sft.train[0].subset must be text, found 3."),
        (
            "data: {sft: {train: [{name: a, split: ''}]}}",
            "data.sft.train[0].split must be text that is not empty, found ''.",
        ),
        (
            "data: {sft: {train: [{name: a, streaming: 9}]}}",
            "data.sft.train[0].streaming must be true or false, found 9.",
        ),
        (
            "data: {registry: {a: {hub: modelscope, kind: sft, subset: zh}}}",
            "data.registry.a.subset must be left out where hub is modelscope: only sets of huggingface are read so, "
            "found 'zh'.",
        ),
        (
            "data: {registry: {a: {hub: url, kind: sft, streaming: true}}}",
            "data.registry.a.streaming must be left out where hub is url: only sets of huggingface are read so, "
            "found true.",
        ),
        ("data: {system: 5}", "data.system must be text, found 5."),
        ("evaluate: {prompts: 你好}", "evaluate.prompts must be a list, found '你好'."),
        ("seed: 99999999999", "seed must be less than 2147483648, found 99999999999."),
        (f"seed: {'啊' * 99}", f"seed must be a whole number, found '{'啊' * 76}...."),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected(text, expected):
    assert refusal(BASE + text) == f"r.yaml:3: {expected}"


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "名字", "a\\nb", "a b"])
def test_a_name_is_a_plain_folder_name(name):
    assert refusal(f'name: "{name}"\nmodel: {{path: m}}\n').startswith("r.yaml:1: name must be a folder name of")


def test_all_problems_of_a_file_are_told_at_once_in_its_order():
    text = BASE + "sft:\n  epoch: 1\n  batch_size: x\nlora: {rank: 0}\nseed: 1\nseed: 2\n"
    assert refusal(text, "memory.micro_tokens=-1").splitlines() == [
        "r.yaml:4: sft.epoch is not a key; did you mean sft.epochs?",
        "r.yaml:5: sft.batch_size must be a whole number, found 'x'.",
        "r.yaml:6: lora.rank must be greater than 0, found 0.",
        "r.yaml:8: seed is given twice (first on line 7).",
        "'memory.micro_tokens=-1': memory.micro_tokens must be greater than 0, found -1.",
    ]


# Files


MAPPING = "a recipe is a mapping of sections (name, model, data, ...)"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", f"r.yaml: {MAPPING}, but this file holds nothing."),
        (
            "# only a comment\n",
            f"r.yaml: {MAPPING}, but this file holds nothing.",
        ),
        (
            "- a\n- b\n",
            f"r.yaml: {MAPPING}, but this file holds a list.",
        ),
        ("text\n", f"r.yaml: {MAPPING}, but this file holds 'text'."),
        ("name: x\nmodel: [\n", "r.yaml:3: not valid YAML: expected the node content, but found '<stream end>'."),
        ("name: x\na: b: c\n", "r.yaml:2: not valid YAML: mapping values are not allowed here."),
        ("name: x\n\tseed: 1\n", "r.yaml:2: not valid YAML: found character '\\t' that cannot start any token."),
        (BASE + "? [a]\n: 1\n", "r.yaml:3: not valid YAML: found unhashable key."),
        (BASE + "---\nseed: 1\n", "r.yaml:3: not valid YAML: but found another document."),
        (BASE + "seed: !!bool maybe\n", "r.yaml: not valid YAML: 'maybe'."),
        (BASE + "a: " + "[" * 5000, "r.yaml: not valid YAML: nested too deeply."),
        (
            "name: x\0\n",
            "r.yaml: not valid YAML: unacceptable character #x0000: special characters are not allowed.",
        ),
        ("name: 名".encode("gbk"), "r.yaml is not UTF-8 text; save it as UTF-8."),
    ],
)
def test_a_file_that_is_no_recipe(text, expected):
    assert refusal(text) == expected


def test_code_in_a_recipe_is_not_run():
    assert "could not determine a constructor" in refusal(BASE + "seed: !!python/object/apply:os.getpid []\n")


def test_a_recipe_that_is_not_there_or_not_a_file():
    with pytest.raises(RecipeError, match=r"there is no recipe at none\.yaml"):
        load_recipe("none.yaml")
    Path("folder.yaml").mkdir()
    with pytest.raises(RecipeError, match=r"folder\.yaml cannot be read: Is a directory"):
        load_recipe("folder.yaml")


def test_a_byte_order_mark_is_no_matter():
    assert read(b"\xef\xbb\xbf" + BASE.encode()).name == "x"


def test_an_alias_to_itself_is_refused_like_any_unknown_key():
    assert refusal(BASE + "sft: &s {again: *s}\n").startswith("r.yaml:3: sft.again is not a key")


# YAML 1.1's surprises


def test_numbers_are_what_people_write_as_numbers():
    sft = read(BASE + "sft: {learning_rate: 1e-5, weight_decay: .5, adam_beta1: 0., epochs: 1E1}").sft
    assert (sft.learning_rate, sft.weight_decay, sft.adam_beta1, sft.epochs) == (1e-5, 0.5, 0.0, 10.0)
    assert read(BASE + "seed: 017").seed == 17  # YAML 1.1 reads 15


@pytest.mark.parametrize("text", ["0o17", "0x1f", "0b11", "1:30", "2024-01-01", "1.5.0", "1e", "NaN"])
def test_what_only_yaml_takes_for_a_number_is_none(text):
    assert refusal(BASE + f"seed: {text}") == f"r.yaml:3: seed must be a whole number, found '{text}'."


def test_words_are_words():
    text = "evaluate: {prompts: [no, yes, on, Off, 1:30, 0o17, 0x1f, 1_000, 2024-01-01, =, 1e5x]}"
    assert read(BASE + text).evaluate.prompts == (
        *("no", "yes", "on", "Off", "1:30", "0o17", "0x1f", "1_000", "2024-01-01", "=", "1e5x"),
    )


def test_variables_are_filled_in_the_system_message_and_in_prompts_and_what_they_expect():
    judged = "{prompt: '{{name}}是谁？', expect: '我叫{{ name }}{{x}}'}"
    text = f"data: {{variables: {{name: 小智}}, system: '你叫{{{{name}}}}'}}\nevaluate: {{prompts: [你好, {judged}]}}"
    recipe = read(BASE + text, 'data.variables.name="007"')
    assert recipe.system_message() == "你叫007"
    assert read(BASE).system_message() is None
    assert [(sample.prompt, sample.expect) for sample in recipe.sample_prompts()] == [
        ("你好", None),
        ("007是谁？", "我叫007{{x}}"),
    ]
    assert "variables" not in read(BASE).to_yaml()  # so that digests of recipes without them stay what they were


# Overrides


def test_overrides_take_the_place_of_any_key():
    recipe = read(
        BASE + "sft: {epochs: 3, batch_size: 4}\n",
        *("sft.epochs=2", "sft.learning_rate = 2e-4", "name=other", "data.system=你是助手", "sft.max_grad_norm=null"),
        *("lora.targets=[q_proj, v_proj]", "model.quantize={bits: 8}", "model.quantize.group_size=32", "seed=7"),
        "data.sft.train=[a.jsonl, {path: b.json, format: alpaca, columns: {output: answer}}]",
    )
    assert (recipe.name, recipe.seed, recipe.data.system) == ("other", 7, "你是助手")
    assert (recipe.sft.epochs, recipe.sft.batch_size, recipe.sft.learning_rate) == (2.0, 4, 2e-4)
    assert recipe.sft.max_grad_norm is None
    assert recipe.lora.targets == ("q_proj", "v_proj")
    assert recipe.model.quantization == (8, 32)
    first, second = recipe.data.sft.train
    assert (first.path, first.format) == ("a.jsonl", "auto")
    assert (second.path, second.format, second.columns) == ("b.json", "alpaca", {"output": "answer"})


def test_the_last_override_of_a_key_counts():
    assert read(BASE, "seed=1", "seed=2").seed == 2


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("sft.learning_rat=1", "sft.learning_rat is not a key; did you mean sft.learning_rate?"),
        ("stf.epochs=1", "stf is not a key; did you mean sft?"),
        ("sft.epochs=many", "sft.epochs must be a number, found 'many'."),
        ("sft.epochs=", "sft.epochs must be a number, found nothing."),
        ("name.first=1", "name is a value, not a section."),
        ("data.sft.train.0=x", "data.sft.train is a list: override the whole list."),
        ("sft..epochs=1", "'sft..epochs' is not a key; write it as in sft.learning_rate=2e-4."),
        ("sft.epochs=[1", "the value is not valid YAML: expected ',' or ']', but got '<stream end>'. Put text in"),
        ("data.sft.train=[{path: a, formt: b}]", "data.sft.train[0].formt is not a key; did you mean"),
    ],
)
def test_what_is_wrong_with_an_override_names_it(override, expected):
    text = BASE + "data: {sft: {train: [a]}}\n"
    assert refusal(text, override).startswith(f"{override!r}: {expected}")


@pytest.mark.parametrize("override", ["sft.epochs", "=1", ""])
def test_an_override_has_a_key_and_a_value(override):
    assert refusal(BASE, override) == (
        f"{override!r} is not an override: write KEY=VALUE, for example sft.learning_rate=2e-4."
    )


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.cutoff_len=512", "data.cutoff_len is not a key. Here it is data.max_length."),
        ("cutoff_len=512", "cutoff_len is not a key. Here it is data.max_length."),
        ("lr=1e-4", "lr is not a key. Here it is sft.learning_rate."),
        ("dpo.lr=1e-4", "dpo.lr is not a key. Here it is dpo.learning_rate."),
        ("sft.num_train_epochs=2", "sft.num_train_epochs is not a key. Here it is sft.epochs."),
        ("sft.iters=9", "sft.iters is not a key. Here it is sft.max_steps."),
        (
            "dpo.per_device_train_batch_size=2",
            "dpo.per_device_train_batch_size is not a key. Here it is dpo.batch_size. It counts the examples of a "
            "whole optimizer step: per_device_train_batch_size × gradient_accumulation_steps × devices.",
        ),
        (
            "sft.gradient_accumulation_steps=4",
            "sft.gradient_accumulation_steps is not a key. Here it is sft.batch_size. Accumulation is automatic: set "
            "sft.batch_size to per_device_train_batch_size × gradient_accumulation_steps.",
        ),
        ("report_to=wandb", "report_to is not a key. Here it is track. For example 'track=[wandb]'."),
        (
            "resume_from_checkpoint=x",
            "resume_from_checkpoint is not a key. Here it is resume. The same command goes on from the newest",
        ),
        ("lora_parameters.scale=20", "lora_parameters is not a key. Here it is lora. Its keys are rank, alpha"),
        ("packing=true", "packing is not a key. It is not needed here. Examples are always packed, and never see"),
    ],
)
def test_names_of_other_programs_are_said_in_this_ones(override, expected):
    assert refusal(BASE, override).startswith(f"{override!r}: {expected}")
    written = "".join(f"{'  ' * depth}{part}:\n" for depth, part in enumerate(override.partition("=")[0].split(".")))
    assert expected in refusal(BASE + written)


def test_every_name_of_another_program_leads_to_a_key_that_exists_and_is_none_itself():
    keys = {name for name, _ in keys_of(Recipe)}
    names = {key.rpartition(".")[2] for key in keys}
    table = yaml.safe_load((ROOT / "mlx_zh" / "language" / "other_names.yaml").read_text())
    for name, entry in table.items():
        assert name not in names, name
        assert entry.keys() <= {"key", "note", "zh", "import", "fine"} and entry, name
        assert ("note" in entry) == ("zh" in entry) and ("key" in entry or "note" in entry), name
        for stage in ("sft", "dpo"):
            assert "key" not in entry or entry["key"].format(stage=stage) in keys, name
            meaning = other_name(f"--{name.replace('_', '-')}", stage)
            assert meaning is not None and meaning.endswith(".") and "{stage}" not in meaning


@pytest.mark.parametrize("sign", ["＝", "：", ":"])
@pytest.mark.parametrize("key", ["sft.epochs", "sft。epochs", "ｓｆｔ．epochs"])
@pytest.mark.parametrize("value", ["2", "２", "２．０"])
def test_what_a_chinese_input_method_writes_in_an_override_is_understood(key, sign, value):
    assert read(BASE, f"{key}{sign}{value}").sft.epochs == 2
    assert read(BASE, f"{key}={value}").sft.epochs == 2


def test_the_value_of_an_override_keeps_its_wide_characters():
    assert read(BASE, "data.system＝你好：世界＝１").data.system == "你好：世界＝１"
    assert read(BASE, "data.system=a：b=c").data.system == "a：b=c"


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("name：x\n", "Line 1 has a full-width colon."),
        (BASE + "sft：\n  epochs: 1\n", "Line 3 has a full-width colon."),
        (BASE + "sft:\n  epochs：1\n", "r.yaml:3: sft must be a section with keys of its own, found 'epochs：1'."),
        (BASE + "sft: {epochs：1}\n", "r.yaml:3: sft.epochs：1 is not a key."),
    ],
)
def test_a_wide_colon_in_a_recipe_is_pointed_at(text, where):
    assert f"{where} Write a plain colon and a space in place of ：" in refusal(text)


def test_home_is_meant_by_a_tilde_in_runs_too(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert read(BASE + "runs: ~/runs\n").run_folder() == tmp_path / "home" / "runs" / "x"
    assert "runs must be a valid name of a folder" in refusal(BASE + "runs: ~nobody-here/runs\n")


def test_an_override_changes_one_of_two_aliased_sections():
    recipe = read(
        BASE + "data:\n  sft: &both {train: [a]}\n  dpo: *both\n", "data.sft.train=[b]", "data.dpo.validation=[c]"
    )
    assert [source.path for source in recipe.data.sft.train] == ["b"]
    assert [source.path for source in recipe.data.dpo.train] == ["a"]
    assert recipe.data.sft.validation == ()


# Paths


def test_files_are_found_beside_the_recipe_and_else_taken_from_here(monkeypatch):
    Path("recipes/data").mkdir(parents=True)
    Path("recipes/data/near.jsonl").touch()
    Path("data").mkdir()
    Path("data/near.jsonl").touch()
    monkeypatch.setenv("HOME", "/home/someone")
    text = "data: {sft: {train: [data/near.jsonl, data/far.jsonl, ../data/near.jsonl, /abs/x.jsonl, ~/y.jsonl]}}"
    Path("recipes/r.yaml").write_text("name: x\nmodel: {path: org/model}\n" + text)
    recipe = load_recipe(Path("recipes/r.yaml"))
    assert [source.path for source in recipe.data.sft.train] == [
        "recipes/data/near.jsonl",
        "data/far.jsonl",
        "data/near.jsonl",
        "/abs/x.jsonl",
        "/home/someone/y.jsonl",
    ]
    assert recipe.model.path == "org/model"
    assert recipe.run_folder() == Path("runs/x")


# Writing it out again


def test_keys_that_came_later_are_written_only_where_they_are_set():
    """Else the digests of runs and checkpoints from before them would change."""
    sources = "[{name: a}, {name: b, subset: zh, split: test, revision: v1, streaming: true}]"
    entries = "{a: {hub: url, kind: sft}, b: {hub: huggingface, kind: sft, subset: zh, streaming: true}}"
    recipe = read(BASE + f"data: {{sft: {{train: {sources}}}, registry: {entries}}}\n")
    first, second = recipe.model_dump(mode="json")["data"]["sft"]["train"]
    later = {"subset": "zh", "split": "test", "revision": "v1", "streaming": True}
    before = {"path": None, "format": "auto", "columns": {}, "max_samples": None, "weight": 1.0}
    assert first == {"name": "a"} | before and second == {"name": "b"} | before | later
    own = recipe.model_dump(mode="json")["data"]["registry"]
    assert own["b"].keys() - own["a"].keys() == {"subset", "streaming"}
    Path("again.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe("again.yaml") == recipe


def test_to_yaml_reads_back_as_an_equal_recipe(tmp_path):
    words = ["no", "1e-5", "0o17", "017", "1:30", "1_000", "null", "~", "-", "=", "", "😀"]
    words += [" a: b # c", "- d", "多 行\n文本"]
    text = BASE + "sft: {learning_rate: 1e-5, max_steps: 3}\nlora: {targets: [q_proj], num_layers: 2}\n"
    recipe = read(text, f"evaluate.prompts={json.dumps(words, ensure_ascii=False)}", "data.system='007'")
    assert list(recipe.evaluate.prompts) == words
    Path("again.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe("again.yaml") == recipe


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_recipe_loads_and_survives_a_round_trip(path, tmp_path):
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    copy = tmp_path / "copy.yaml"
    copy.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(copy) == recipe


def test_the_llama_recipes_differ_in_memory_alone():
    loaded = {size: load_recipe(ROOT / f"recipes/llama31-8b-zh-{size}gb.yaml") for size in (16, 32, 64)}
    learning = [recipe.model_dump(exclude={"name", "memory"}) for recipe in loaded.values()]
    assert learning[0] == learning[1] == learning[2]
    memories = [recipe.memory for recipe in loaded.values()]
    assert [memory.micro_tokens for memory in memories] == [1024, 1024, 4096]
    assert {memory.checkpoint_layers for memory in memories} == {"auto"}  # each row decides by the machine's memory


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_setting_of_a_shipped_recipe_is_explained(path):
    """On its line or right above it, there or where the same key comes first."""
    lines = path.read_text(encoding="utf-8").splitlines()
    settings = [(n, re.match(r" +(\w+): ", line)) for n, line in enumerate(lines)]
    explained = {key[1] for n, key in settings if key and ("#" in lines[n] or "#" in lines[n - 1])}
    assert {key[1] for _, key in settings if key} - explained <= {"train", "validation", "max_new_tokens"}
