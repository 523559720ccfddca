"""Post-training on one device or under torchrun: SFT, expert iteration, GRPO and its family, DPO."""

import model as lm


def encode_text(tokenizer, text):
    """The ids of `text` alone, no token added: by our Tokenizer or one of Hugging Face."""
    try:
        ids = tokenizer.encode(text, add_special_tokens=False)
    except TypeError:  # ours adds none
        ids = tokenizer.encode(text)
    return list(getattr(ids, "ids", ids))


def end_ids(tokenizer):
    """The ids that end a text: the tokenizer's eos_token_id, or all of our special tokens."""
    if hasattr(tokenizer, "eos_token_id"):
        return () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    return tuple(lm.special_ids(tokenizer))


def rollout(model, tokenizer, prompts, max_new_tokens, temperature=1.0, top_p=1.0, group_size=1,
            stop=(), seed=0):
    """group_size sampled responses to each prompt, prompt by prompt: a list of dicts with
    prompt_index, prompt_ids, tokens (with the end token, if drawn), logprobs (of tokens, under
    softmax(logits / temperature)), text and finish_reason ("stop" or "length").

    prompts: strings; stop: strings that end a response, which keeps them
    raises ValueError where a prompt leaves no room for max_new_tokens in the model's context
    """
    ids = [encode_text(tokenizer, prompt) for prompt in prompts]
    longest, limit = max(map(len, ids), default=0), model.config.context_length
    if longest + max_new_tokens > limit:
        raise ValueError(f"a prompt and max_new_tokens must fit the context of {limit} tokens, got "
                         f"{longest} + {max_new_tokens}; drop long prompts or ask for fewer tokens")
    rows = lm.generate(model, ids, max_new_tokens, temperature, top_p=top_p, num_samples=group_size,
                       stop_ids=end_ids(tokenizer), stop_strings=tuple(stop), tokenizer=tokenizer,
                       seed=seed)
    return [dict(prompt_index=r.prompt_index, prompt_ids=ids[r.prompt_index], tokens=r.tokens,
                 logprobs=r.logprobs, text=r.text, finish_reason=r.finish_reason) for r in rows]
