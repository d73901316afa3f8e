"""The prompt as documented: pieces of text side by side, whatever the tokeniser."""

import dataclasses

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import data
from data import InputError, build_trie, load_dataset, make_prompts, one_prompt

SPECIAL = ["<unk>", "<s>", "</s>"]


def trained(tokenizer, trainer):
    """The tokeniser after training on toy's titles, its template and all visible ASCII."""
    dataset = load_dataset("toy")
    texts = [f'"{title}"' for title in dataset.titles]
    texts += [data.task_text(dataset), data.MARKER, " ".join(map(chr, range(33, 127)))] * 20
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def unigram():
    """Like SentencePiece: it puts a word mark before every text that it encodes."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=600, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    return trained(tokenizer, trainer)


def llama():
    """Like Llama 2 and Mistral 0.1: BPE with word marks from a normaliser and a byte fallback."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    marks = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(marks)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    spare = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=SPECIAL + spare, show_progress=False
    )
    return trained(tokenizer, trainer)


def byte_level(prefix):
    """Like GPT-2 and Llama 3 or, if `prefix`, like RoBERTa: it puts a blank before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    return trained(tokenizer, trainer)


TOKENISERS = {
    "tiny": lambda: data.tiny_tokenizer(load_dataset("toy")),
    "byte level": lambda: byte_level(prefix=False),
    "byte level, blank first": lambda: byte_level(prefix=True),
    "unigram": unigram,
    "llama": llama,
}


@pytest.fixture(scope="module", params=TOKENISERS)
def tokenizer(request):
    return TOKENISERS[request.param]()


def test_the_decoded_prompt_is_the_template(tokenizer):
    dataset = load_dataset("toy")
    prompts = make_prompts(dataset, tokenizer, 4096)
    for window in dataset.train[3:9]:
        history = ""
        for item in window.items[window.start : window.stop]:
            history += f'"{dataset.titles[item]}"\n'
        target = f'"{dataset.titles[window.items[window.stop]]}"'
        ids, _, _ = one_prompt(prompts, window)
        assert ids.count(tokenizer.bos_token_id) == 1
        assert ids.count(tokenizer.eos_token_id) == 1
        text = tokenizer.decode(ids[1:-1], clean_up_tokenization_spaces=False)
        assert text == data.task_text(dataset) + history + data.MARKER + target


def test_titles_are_text_though_they_name_special_tokens(tokenizer):
    encode = data.piece_encoder(tokenizer)
    names = [tokenizer.bos_token, tokenizer.eos_token]
    before = encode("Half ")
    for name in names:
        for title in (f"Half {name} Life", name, f'Half"{name}', name + name):
            ids = encode(title)
            assert not {tokenizer.bos_token_id, tokenizer.eos_token_id} & set(ids)
            text = tokenizer.decode(before + ids, clean_up_tokenization_spaces=False)
            assert text == f"Half {title}"


def test_a_title_that_goes_on_after_the_end_of_another_is_refused_by_name():
    with pytest.raises(InputError, match="item long goes on after EOS.*item short ends"):
        build_trie([[5, 1, 7, 1], [5, 1]], ["long", "short"])
    with pytest.raises(InputError, match="items long and short have the same"):
        build_trie([[5, 1], [5, 1]], ["long", "short"])
    build_trie([[5, 7, 1], [5, 1]], ["long", "short"])


def test_messages_name_id_and_title():
    """The user can find these in the files, unlike the numbers that items have here."""
    dataset = load_dataset("toy")
    tokenizer = data.tiny_tokenizer(dataset)
    changed = list(dataset.titles)
    changed[7] = "word " * 300
    named = dataclasses.replace(dataset, titles=changed, ids=[f"B00{i}" for i in range(999)])
    with pytest.raises(InputError, match=r"item B007 \('word word.*choose another model"):
        make_prompts(named, tokenizer, 256)
