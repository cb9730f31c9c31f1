"""Public clients from PyPI, unmodified, against the application behind a real server."""

from __future__ import annotations

import asyncio
import gc
import importlib
import json
import os
import warnings
from collections.abc import AsyncIterator, Iterator
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from actors.api.generation import ROLES, Event, Generate
from router.api import create_app
from tests.support.scripted_service import ScriptedBackend, config, serving, tokenizers
from tests.support.tokenizers import role_tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:::litellm"),
    pytest.mark.filterwarnings("ignore:::pydantic"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

SAID = "It is Eve ."
ASK: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who is it?"}]
EXTRA = {"guidance": {"alpha": 0.5}, "thinking": {"start": "<think>"}, "return_token_ids": True}


@pytest.fixture(scope="module")
def litellm() -> Any:
    """The package; imported here, since that takes seconds."""
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "true"  # otherwise its import downloads prices
    return imported("litellm")


@pytest.fixture(scope="module")
def langchain() -> Any:
    """The package, likewise."""
    return imported("langchain_openai")


@pytest.fixture(scope="module")
def instructor() -> Any:
    """The package, likewise; it wants older versions of its dependencies than are pinned, and works with these."""
    pytest.importorskip("instructor")
    return imported("instructor")


def imported(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # their own
        return importlib.import_module(name)


@pytest.fixture(autouse=True)
def collect_garbage() -> Iterator[None]:
    """Closes within the test what its clients leave open."""
    yield
    gc.collect()


@pytest.fixture
def backend() -> ScriptedBackend:
    return ScriptedBackend(thought="So Eve", text=SAID)


@pytest.fixture
async def url(backend: ScriptedBackend) -> AsyncIterator[str]:
    async with serving(create_app(config(), tokenizers(), backend)) as url:
        yield f"{url}/v1"


async def test_the_official_sync_client_reads_every_answer(url: str, backend: ScriptedBackend) -> None:
    def ask() -> None:
        with openai.OpenAI(api_key="none", base_url=url, max_retries=0) as api:
            assert "duo/target" in [model.id for model in api.models.list()]
            whole = api.chat.completions.create(model="duo", messages=ASK, seed=7, extra_body=EXTRA)
            assert whole.choices[0].message.content == SAID
            assert whole.choices[0].model_extra is not None
            assert whole.choices[0].model_extra["token_ids"] == list(range(6))
            options: Any = {"include_usage": True}
            chunks = list(
                api.chat.completions.create(model="duo", messages=ASK, stream=True, stream_options=options, n=2)
            )
            texts = [chunk.choices[0].delta.content or "" for chunk in chunks[:-1] if chunk.choices[0].index == 1]
            assert "".join(texts) == SAID
            assert chunks[-1].usage is not None
            assert chunks[-1].usage.completion_tokens == 12
            text = api.completions.create(model="duo", prompt=[[1, 2], [3]], stop=list("abcdef"), max_tokens=8)
            assert [choice.text for choice in text.choices] == [SAID] * 2
            with pytest.raises(openai.BadRequestError, match="temperature") as caught:
                api.chat.completions.create(model="duo", messages=ASK, temperature=-1)
            assert caught.value.param == "temperature"

    await asyncio.to_thread(ask)
    assert backend.requests[0].guidance.alpha == 0.5


async def test_the_official_async_client_reads_every_answer(url: str, backend: ScriptedBackend) -> None:
    async with openai.AsyncOpenAI(api_key="none", base_url=url, max_retries=0) as api:
        names = ["duo", "duo/target", "duo/guider", "duo/guider-base"]
        assert [model.id async for model in api.models.list()] == names
        assert (await api.models.retrieve("duo/guider-base")).id == "duo/guider-base"
        whole = await api.chat.completions.create(model="duo", messages=ASK, max_completion_tokens=9, extra_body=EXTRA)
        message = whole.choices[0].message
        assert (message.content, whole.choices[0].finish_reason) == (SAID, "stop")
        assert message.model_extra == {"reasoning": "So Eve", "reasoning_content": "So Eve"}
        assert whole.usage is not None
        assert whole.usage.completion_tokens_details is not None
        assert whole.usage.completion_tokens_details.reasoning_tokens == 2
        history: list[Any] = [message, {"role": "user", "content": "And?"}]
        chunks = await api.chat.completions.create(model="duo", messages=history, stream=True)
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in chunks]) == SAID
        async with api.chat.completions.stream(model="duo", messages=ASK) as stream:
            final = await stream.get_final_completion()
        assert final.choices[0].message.content == SAID
        text = await api.completions.create(model="duo", prompt="Who", stream=True)
        assert "".join([chunk.choices[0].text async for chunk in text]) == SAID
        alone = await api.completions.create(
            model="duo/target", prompt=["Hi", "Ho"], extra_body={"thinking": EXTRA["thinking"]}
        )
        assert [choice.text for choice in alone.choices] == [SAID] * 2
        assert alone.choices[0].model_extra is not None
        assert alone.choices[0].model_extra["reasoning"] == "So Eve"
        with pytest.raises(openai.NotFoundError, match="served are duo, duo/target"):
            await api.completions.create(model="gpt", prompt="Who")
    assert backend.requests[0].guidance.alpha == 0.5


async def test_the_official_client_ignores_keep_alives(backend: ScriptedBackend) -> None:
    backend.proceed = asyncio.Event()
    service = config(router={"keep_alive_s": 0.02})
    async with serving(create_app(service, tokenizers(), backend)) as url:
        async with openai.AsyncOpenAI(api_key="none", base_url=f"{url}/v1", max_retries=0) as api:
            stream = await api.chat.completions.create(model="duo", messages=ASK, stream=True)
            first = await anext(stream)
            assert first.choices[0].delta.role == "assistant"
            await asyncio.sleep(0.1)
            backend.proceed.set()
            texts = [chunk.choices[0].delta.content or "" async for chunk in stream]
    assert "".join(texts) == SAID


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
async def test_litellm_reads_answers_and_errors(url: str, litellm: Any, provider: str) -> None:
    usual: Any = {"model": f"{provider}/duo", "api_base": url, "api_key": "none", "messages": ASK, "num_retries": 0}
    whole: Any = await litellm.acompletion(**usual, extra_body={"guidance": {"alpha": 0.5}})
    assert whole.choices[0].message.content == SAID
    assert whole.choices[0].message.reasoning_content == "So Eve"
    assert whole.usage.completion_tokens == 6
    stream: Any = await litellm.acompletion(**usual, stream=True, stop=["a", "b"], max_tokens=9)
    assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == SAID
    waited: Any = await asyncio.to_thread(litellm.completion, **usual, temperature=0.5)
    assert waited.choices[0].message.content == SAID
    with pytest.raises(litellm.exceptions.BadRequestError, match="temperature"):
        await litellm.acompletion(**usual, temperature=-1)


async def test_langchain_reads_answers_streams_and_batches(url: str, langchain: Any) -> None:
    usual: Any = {"base_url": url, "api_key": "none", "model": "duo", "max_retries": 0}
    model = langchain.ChatOpenAI(**usual, temperature=0.5, extra_body={"guidance": {"alpha": 0.5}})
    assert (await model.ainvoke("Who is it?")).content == SAID
    texts = [str(chunk.content) async for chunk in model.astream("Who is it?")]
    assert "".join(texts) == SAID
    answers = await asyncio.to_thread(model.batch, ["Who?", "What?"])
    assert [answer.content for answer in answers] == [SAID] * 2
    assert await langchain.OpenAI(**usual).ainvoke("Who is it?") == SAID


AND: Any = {"role": "user", "content": "And?"}
HISTORY = [f"assistant\n{SAID}<|end|>", "user\nAnd?"]
CALL: Any = {"id": "call_1", "type": "function", "function": {"name": "find", "arguments": '{"who": "Ada"}'}}


def read_by_the_target(backend: ScriptedBackend) -> str:
    """The prompt of the newest request."""
    return tokenizers()["target"].decode(backend.requests[-1].prompts["target"], skip_special=False)


def assert_read(backend: ScriptedBackend) -> None:
    """The target reads the earlier answer and the next question, once each."""
    prompt = read_by_the_target(backend)
    assert [prompt.count(turn) for turn in HISTORY] == [1, 1]


@pytest.mark.parametrize("thought", ["So Eve", ""])
async def test_the_official_client_sends_answers_back(url: str, backend: ScriptedBackend, thought: str) -> None:
    backend.thought = thought
    async with openai.AsyncOpenAI(api_key="none", base_url=url, max_retries=0) as api:
        create = api.chat.completions.create
        whole = (await create(model="duo", messages=ASK)).choices[0].message
        parsed = (await api.chat.completions.parse(model="duo", messages=ASK)).choices[0].message
        async with api.chat.completions.stream(model="duo", messages=ASK) as stream:
            streamed = (await stream.get_final_completion()).choices[0].message
        for message in (whole, whole.model_dump(), whole.to_dict(), parsed, parsed.model_dump(), streamed.model_dump()):
            answer: Any = message
            await create(model="duo", messages=[*ASK, answer, AND])
            assert_read(backend)
            chunks = await create(model="duo", messages=[*ASK, answer, AND], stream=True)
            assert "".join([chunk.choices[0].delta.content or "" async for chunk in chunks]) == SAID
            assert_read(backend)


async def test_the_official_client_sends_tool_calls_and_results_back(url: str, backend: ScriptedBackend) -> None:
    result: Any = {"role": "tool", "tool_call_id": "call_1", "content": SAID}
    async with openai.AsyncOpenAI(api_key="none", base_url=url, max_retries=0) as api:
        for calls in ([CALL], [{"index": 0, **CALL, "function": {"name": "find", "arguments": ""}}]):
            asked: Any = {"role": "assistant", "content": None, "refusal": None, "tool_calls": calls}
            await api.chat.completions.create(model="duo", messages=[*ASK, asked, result])
            assert f"tool\n{SAID}<|end|>" in read_by_the_target(backend)


@pytest.mark.parametrize("thought", ["So Eve", ""])
@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
async def test_litellm_sends_answers_back(
    url: str, backend: ScriptedBackend, litellm: Any, provider: str, thought: str
) -> None:
    backend.thought = thought
    usual: Any = {"model": f"{provider}/duo", "api_base": url, "api_key": "none", "num_retries": 0}
    whole: Any = await litellm.acompletion(**usual, messages=ASK)
    stream: Any = await litellm.acompletion(**usual, messages=ASK, stream=True)
    streamed: Any = litellm.stream_chunk_builder([chunk async for chunk in stream], messages=ASK)
    for message in (answer.choices[0].message for answer in (whole, streamed)):
        for form in (message, message.model_dump()):
            await litellm.acompletion(**usual, messages=[*ASK, form, AND])
            assert_read(backend)


@pytest.mark.parametrize("thought", ["So Eve", ""])
async def test_langchain_sends_answers_back(url: str, backend: ScriptedBackend, langchain: Any, thought: str) -> None:
    backend.thought = thought
    model = langchain.ChatOpenAI(base_url=url, api_key="none", model="duo", max_retries=0)
    asked = [("system", "Be brief."), ("human", "Who is it?")]
    whole = await model.ainvoke(asked)
    chunks = [chunk async for chunk in model.astream(asked)]
    streamed = chunks[0]
    for chunk in chunks[1:]:
        streamed = streamed + chunk
    for answer in (whole, streamed):
        assert (await model.ainvoke([*asked, answer, ("human", "And?")])).content == SAID
        assert_read(backend)
    messages = importlib.import_module("langchain_core.messages")
    call = messages.AIMessage("", tool_calls=[{"name": "find", "args": {"who": "Ada"}, "id": "call_1"}])
    await model.ainvoke([*asked, call, messages.ToolMessage(SAID, tool_call_id="call_1")])
    assert f"tool\n{SAID}<|end|>" in read_by_the_target(backend)


class Person(BaseModel):
    """The fields that instructor reads from an answer."""

    name: str
    age: int


class CorrectedBackend(ScriptedBackend):
    """A backend whose first answer lacks a field."""

    async def generate(self, request: Generate) -> AsyncIterator[Event]:
        fields = '"name": "Eve"' if not self.requests else '"name": "Eve", "age": 7'
        self.text = f"```json {{{fields}}} ```"
        async for event in super().generate(request):
            yield event


async def test_instructor_asks_again_and_sends_answers_back(instructor: Any) -> None:
    backend = CorrectedBackend(thought="So Eve")
    roomy = config(models={role: {"max_position": 4_096} for role in ROLES})  # its instructions are long
    async with serving(create_app(roomy, tokenizers(), backend)) as url:
        async with openai.AsyncOpenAI(api_key="none", base_url=f"{url}/v1", max_retries=0) as api:
            model = instructor.from_openai(api, mode=instructor.Mode.MD_JSON)
            asked = {"model": "duo", "response_model": Person, "max_retries": 1}
            person, answer = await model.chat.completions.create_with_completion(messages=ASK, **asked)
            assert (person.name, person.age, len(backend.requests)) == ("Eve", 7, 2)
            history = [*ASK, answer.choices[0].message.model_dump(), {"role": "user", "content": "And who is that?"}]
            again = await model.chat.completions.create(messages=history, **asked)
    assert again.age == 7


CALLING = 'I ask. <tool_call> {"name": "Person", "arguments": {"name": "Eve", "age": 7}} </tool_call>'
PERSON = {"name": "Eve", "age": 7}
TOOL: Any = openai.pydantic_function_tool(Person)


@pytest.fixture
async def tool_url() -> AsyncIterator[str]:
    """A service whose every answer calls the tool, or tells what it found if it has the tool's result."""
    backend = AgentBackend()
    roomy = config(models={role: {"max_position": 4_096} for role in ROLES})
    async with serving(create_app(roomy, roomy_tokenizers(), backend)) as url:
        yield f"{url}/v1"


def roomy_tokenizers() -> dict[Any, Any]:
    return {role: role_tokenizer(max_position=4_096) for role in ROLES}


class AgentBackend(ScriptedBackend):
    """A backend that calls a tool, and answers once it reads the tool's result."""

    async def generate(self, request: Generate) -> AsyncIterator[Event]:
        prompt = roomy_tokenizers()["target"].decode(request.prompts["target"], skip_special=False)
        self.text = SAID if "<|turn|>tool" in prompt else CALLING
        async for event in super().generate(request):
            yield event


async def test_the_official_client_calls_tools(tool_url: str) -> None:
    async with openai.AsyncOpenAI(api_key="none", base_url=tool_url, max_retries=0) as api:
        asked: Any = {"model": "duo", "messages": ASK, "tools": [TOOL]}
        whole = (await api.chat.completions.create(**asked, tool_choice="required")).choices[0]
        parsed = (await api.chat.completions.parse(**asked)).choices[0]
        async with api.chat.completions.stream(**asked) as stream:
            kinds = [event.type async for event in stream]
            streamed = (await stream.get_final_completion()).choices[0]
        assert "tool_calls.function.arguments.delta" in kinds
        assert "tool_calls.function.arguments.done" in kinds
        for choice in (whole, parsed, streamed):
            assert choice.finish_reason == "tool_calls"
            assert choice.message.content == "I ask."
            calls: Any = choice.message.tool_calls
            assert [Person.model_validate_json(call.function.arguments) for call in calls] == [Person(**PERSON)]
        assert parsed.message.tool_calls is not None
        assert parsed.message.tool_calls[0].function.parsed_arguments == Person(**PERSON)
        for message in (whole.message, streamed.message.model_dump()):
            calls = message["tool_calls"] if isinstance(message, dict) else message.tool_calls
            id_ = calls[0]["id"] if isinstance(calls[0], dict) else calls[0].id
            history: Any = [*ASK, message, {"role": "tool", "tool_call_id": id_, "content": SAID}]
            again = await api.chat.completions.create(model="duo", messages=history, tools=[TOOL])
            assert (again.choices[0].message.content, again.choices[0].finish_reason) == (SAID, "stop")


async def test_langchain_calls_tools_in_a_loop(tool_url: str, langchain: Any) -> None:
    tools, messages = (
        importlib.import_module("langchain_core.tools"),
        importlib.import_module("langchain_core.messages"),
    )

    def found(name: str, age: int) -> str:
        """Find a person."""
        return f"{name} is {age}"

    tool = tools.StructuredTool.from_function(found, name="Person")
    model = langchain.ChatOpenAI(base_url=tool_url, api_key="none", model="duo", max_retries=0)
    for choice in (None, "any", "Person"):
        bound = model.bind_tools([tool], tool_choice=choice)
        talk: list[Any] = [messages.HumanMessage("Who is it?")]
        talk.append(await bound.ainvoke(talk))
        assert [call["args"] for call in talk[-1].tool_calls] == [PERSON]
        talk += [await tool.ainvoke(call) for call in talk[-1].tool_calls]
        assert talk[-1].content == "Eve is 7"
        answer = await bound.ainvoke(talk)
        assert (answer.content, answer.tool_calls) == (SAID, [])
    chunks = [chunk async for chunk in model.bind_tools([tool]).astream("Who is it?")]
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole = whole + chunk
    assert [call["args"] for call in whole.tool_calls] == [PERSON]
    structured = model.with_structured_output(Person, method="function_calling")
    assert await structured.ainvoke("Who is it?") == Person(**PERSON)


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
async def test_litellm_calls_tools(tool_url: str, litellm: Any, provider: str) -> None:
    usual: Any = {"model": f"{provider}/duo", "api_base": tool_url, "api_key": "none", "num_retries": 0}
    whole: Any = await litellm.acompletion(**usual, messages=ASK, tools=[TOOL], tool_choice="auto")
    stream: Any = await litellm.acompletion(**usual, messages=ASK, tools=[TOOL], stream=True)
    streamed: Any = litellm.stream_chunk_builder([chunk async for chunk in stream], messages=ASK)
    for answer in (whole, streamed):
        message = answer.choices[0].message
        assert answer.choices[0].finish_reason == "tool_calls"
        assert Person.model_validate_json(message.tool_calls[0].function.arguments) == Person(**PERSON)
        result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": SAID}
        again: Any = await litellm.acompletion(**usual, messages=[*ASK, message, result], tools=[TOOL])
        assert again.choices[0].message.content == SAID


async def test_instructor_reads_objects_from_tool_calls(tool_url: str, instructor: Any) -> None:
    async with openai.AsyncOpenAI(api_key="none", base_url=tool_url, max_retries=0) as api:
        model = instructor.from_openai(api, mode=instructor.Mode.TOOLS)
        person = await model.chat.completions.create(model="duo", response_model=Person, messages=ASK)
        assert person.model_dump() == PERSON


def sent_schemas(backend: ScriptedBackend) -> list[Any]:
    """The JSON schemas of the requests' grammars."""
    return [json.loads(request.grammar)["grammars"][0]["json_schema"] for request in backend.requests]


@pytest.fixture
def person() -> ScriptedBackend:
    """A backend that answers with a person."""
    return ScriptedBackend(thought="So Eve", text='{"name": "Eve", "age": 7}')


@pytest.fixture
async def person_url(person: ScriptedBackend) -> AsyncIterator[str]:
    roomy = config(models={role: {"max_position": 4_096} for role in ROLES})  # some clients send long instructions
    async with serving(create_app(roomy, tokenizers(), person)) as url:
        yield f"{url}/v1"


EVE = Person(name="Eve", age=7)


async def test_the_official_client_parses_answers_into_a_model(person_url: str, person: ScriptedBackend) -> None:
    async with openai.AsyncOpenAI(api_key="none", base_url=person_url, max_retries=0) as api:
        whole = await api.chat.completions.parse(model="duo", messages=ASK, response_format=Person)
        assert whole.choices[0].message.parsed == EVE
        async with api.chat.completions.stream(model="duo", messages=ASK, response_format=Person) as stream:
            events = [event async for event in stream]
            assert (await stream.get_final_completion()).choices[0].message.parsed == EVE
    assert [event.parsed for event in events if event.type == "content.done"] == [EVE]
    for schema in sent_schemas(person):
        assert schema["required"] == ["name", "age"]
        assert schema["additionalProperties"] is False


@pytest.mark.parametrize("mode", ["JSON", "JSON_SCHEMA", "MD_JSON"])
async def test_instructor_reads_models_in_its_json_modes(
    person_url: str, person: ScriptedBackend, instructor: Any, mode: str
) -> None:
    async with openai.AsyncOpenAI(api_key="none", base_url=person_url, max_retries=0) as api:
        model = instructor.from_openai(api, mode=instructor.Mode[mode])
        asked: dict[str, Any] = {"model": "duo", "messages": ASK, "response_model": Person, "max_retries": 0}
        assert (await model.chat.completions.create(**asked)).model_dump() == EVE.model_dump()  # of a class of its own
        if mode != "MD_JSON":
            *_, last = [part async for part in model.chat.completions.create_partial(**asked)]
            assert (last.name, last.age) == ("Eve", 7)
    assert all(request.grammar for request in person.requests) is (mode != "MD_JSON")


@pytest.mark.parametrize("method", ["json_schema", "json_mode"])
async def test_langchain_reads_structured_output(
    person_url: str, person: ScriptedBackend, langchain: Any, method: str
) -> None:
    model = langchain.ChatOpenAI(base_url=person_url, api_key="none", model="duo", max_retries=0)
    structured = model.with_structured_output(Person, method=method)
    assert await structured.ainvoke("Who is it? Answer in JSON.") == EVE
    assert [part async for part in structured.astream("Who is it? Answer in JSON.")][-1] == EVE
    for schema in sent_schemas(person):
        assert schema.get("required") == (["name", "age"] if method == "json_schema" else None)


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
async def test_litellm_sends_response_formats(
    person_url: str, person: ScriptedBackend, litellm: Any, provider: str
) -> None:
    usual: Any = {"model": f"{provider}/duo", "api_base": person_url, "api_key": "none", "messages": ASK}
    for form in (Person, {"type": "json_object"}):
        answer: Any = await litellm.acompletion(**usual, response_format=form, num_retries=0)
        assert Person.model_validate_json(answer.choices[0].message.content) == EVE
    model, anything = sent_schemas(person)
    assert model["required"] == ["name", "age"]
    assert "properties" not in anything
