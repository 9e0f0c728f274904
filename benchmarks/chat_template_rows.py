"""The rows that `chat_templates.py` renders with every template: prompts, completions and tools of many kinds."""

ASK, ANSWER = (
    {"role": "user", "content": "Is it raining in Oslo?"},
    {"role": "assistant", "content": "Yes, it is."},
)
MORE, SYSTEM = {"role": "user", "content": "And in Lima?"}, {"role": "system", "content": "Be brief, friend."}
LAST = {"role": "assistant", "content": "No, never."}
BEGUN = {"role": "assistant", "content": "I looked. "}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {
            "id": "abcdef123",
            "type": "function",
            "function": {"name": "weather", "arguments": {"town": "Bergen"}},
        }
    ],
}
AS_TEXT = {
    **CALL,
    "tool_calls": [
        {**CALL["tool_calls"][0], "function": {"name": "weather", "arguments": '{"town": "Bergen"}'}}
    ],
}
RESULT = {"role": "tool", "name": "weather", "tool_call_id": "abcdef123", "content": "rain, 9 C"}
WEATHER = {
    "name": "weather",
    "description": "Weather of a town",
    "parameters": {
        "type": "object",
        "properties": {"town": {"type": "string", "description": "its name"}},
        "required": ["town"],
    },
}
TOOLS = [{"type": "function", "function": WEATHER}]
THOUGHT = "I look outside."
# Prompt, completion, tools.
KINDS: dict[str, tuple[list[dict], list[dict], list[dict] | None]] = {
    "one turn": ([ASK], [ANSWER], None),
    "system": ([SYSTEM, ASK], [ANSWER], None),
    "several turns": ([ASK, ANSWER, MORE], [LAST], None),
    "system, several turns": ([SYSTEM, ASK, ANSWER, MORE], [LAST], None),
    "a begun answer": ([ASK, BEGUN], [LAST], None),
    "two answers": ([ASK], [ANSWER, MORE, LAST], None),
    "reasoning_content": ([ASK], [{**ANSWER, "reasoning_content": THOUGHT}], None),
    "<think> in the text": ([ASK], [{**ANSWER, "content": f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER['content']}"}], None),
    "reasoning in the prompt": ([ASK, {**ANSWER, "reasoning_content": THOUGHT}, MORE], [LAST], None),
    "answers with tools": ([ASK], [ANSWER], TOOLS),
    "a call": ([ASK], [CALL], TOOLS),
    "a call as text": ([ASK], [AS_TEXT], TOOLS),
    "after a result": ([ASK, CALL, RESULT], [ANSWER], TOOLS),
    "call, result, answer": ([ASK], [CALL, RESULT, ANSWER], TOOLS),
}  # fmt: skip
