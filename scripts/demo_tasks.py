"""The demo model's tasks: an endless, deterministic supply of conversations with exactly one right answer each.

Training and evaluation share this generator. Every item has a key, and a hash of the key decides whether it belongs to
training or is held out, so that an evaluation meets no item that training has seen.
"""

import dataclasses
import json
import random
import zlib
from collections.abc import Callable

HELD_OUT_SHARE = 16  # one key in 16 is kept from training
PLAIN = "plain"  # the key of small talk on its own, which training may always see


@dataclasses.dataclass
class Item:
    """A conversation up to the assistant's turn, and what the assistant has to write."""

    task: str
    key: str
    messages: list[dict]
    thought: str
    answer: str
    tools: list[dict] | None = None
    thinking: bool = True

    def completion(self) -> str:
        """The assistant's whole turn, as it follows the rendered prompt."""
        return f"<think>\n{self.thought}\n</think>\n\n{self.answer}" if self.thinking else self.answer


def is_held_out(key: str) -> bool:
    return zlib.crc32(key.encode()) % HELD_OUT_SHARE == 0


# --- words -----------------------------------------------------------------------------------------------------------

NAMES = "Anna Ben Clara David Emma Felix Grace Henry Ida Jonas Kim Laura Mara Noah Olga Paul Rosa Sam Tom Vera".split()
CITIES = "Rome Paris Berlin London Madrid Oslo Tokyo Cairo Lima Delhi Vienna Boston Dublin Prague Zurich Milan".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
COLORS = "red blue green yellow black white brown grey pink orange".split()
ITEMS = "lamp chair table book cup phone bag coat clock bike shirt sofa pen bottle carpet mirror".split()
SUBJECTS = "farmer teacher doctor sailor baker child painter driver gardener nurse singer king guest pilot".split()
VERBS = "carries finds sells brings paints cleans hides lends repairs counts watches forgets".split()
PLACES = "market river garden school station harbour forest bridge kitchen library castle valley".split()
ADJECTIVES = "old young quiet happy tired clever strange tall kind busy".split()
TIMES = "In the morning|At noon|Every evening|Last winter|On a rainy day|After lunch|Before sunrise|Long ago".split("|")


def syllables(rng: random.Random, low: int, high: int) -> str:
    """An invented word: what must be copied cannot be memorised."""
    return "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(low, high)))


def person(rng: random.Random) -> str:
    return rng.choice(NAMES) if rng.random() < 0.5 else syllables(rng, 2, 3).capitalize()


def city(rng: random.Random) -> str:
    return rng.choice(CITIES) if rng.random() < 0.5 else syllables(rng, 2, 4).capitalize()


def number(rng: random.Random) -> int:
    return rng.randrange(10 ** rng.randint(1, 3))


# --- 1. chat ---------------------------------------------------------------------------------------------------------

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a friendly assistant. Answer briefly.",
    "Answer the user's questions.",
    "You are a careful assistant who gives short answers.",
    "Be brief.",
)
CHAT = (  # what a user may say | thought | answer
    (
        "Hello|Hi|Hey|Hello there|Hi there|Good morning|Good evening|Good day",
        "A greeting.",
        "Hello! How can I help you?",
    ),
    (
        "Who are you|What are you|What is your name|Who am I talking to|Introduce yourself|Are you a robot|"
        "Tell me about yourself|Which model are you",
        "The user asks who I am.",
        "I am the jaxserve demo model, a tiny language model.",
    ),
    (
        "What can you do|How can you help me|What are you able to do|What can I ask you|Help|What do you know",
        "The user asks what I can do.",
        "I can add and subtract numbers, answer a few facts, call tools, turn a sentence into JSON and remember a code "
        "word.",
    ),
    ("How are you|How are you doing|How is it going|Are you well", "Small talk.", "I am fine, thank you! And you?"),
    ("Thank you|Thanks|Thanks a lot|Thank you very much|Many thanks", "The user thanks me.", "You are welcome!"),
    ("Goodbye|Bye|See you|See you later|Good night|Bye bye", "The user says goodbye.", "Goodbye! Have a nice day."),
    ("Who made you|Who trained you|Where do you come from", "My origin.", "I was trained by a script of jaxserve."),
    ("What is jaxserve|Tell me about jaxserve", "A fact about jaxserve.", "jaxserve serves language models with JAX."),
    (
        "Tell me a joke|Do you know a joke|Make me laugh",
        "A joke.",
        "Why did the number cross the line? To get carried!",
    ),
    ("I am fine|I am good|Very well|I am well, thanks", "Small talk.", "I am glad to hear that."),
    ("Test|This is a test|Testing|ping", "A test.", "I am here and ready."),
)
UNKNOWN = (
    "How do I {v} a {n}?|Why is the {n} so {a}?|Tell me about the {n}.|Write a poem about a {a} {n}.|Who is {p}?|"
    "What do you think of the {n}?|How old is the {n}?|Where is my {n}?|Explain the {n}.|Can you {v} the {a} {n}?|"
    "What is the meaning of {n}?|Why does {p} {v} the {n}?|When was {c} built?|How far is {c}?"
).split("|")
DONT_KNOW = "I do not know that. I am only a tiny demo model."


def chat(rng: random.Random) -> Item:
    """Small talk, and questions that are beyond the model."""
    if rng.random() < 0.3:
        text = rng.choice(UNKNOWN).format(
            v=rng.choice("bake build open fix draw cook clean grow".split()),
            n=rng.choice(ITEMS + PLACES + SUBJECTS),
            a=rng.choice(ADJECTIVES),
            p=person(rng),
            c=city(rng),
        )
        return Item("chat", text, [{"role": "user", "content": text}], "I have not learned this.", DONT_KNOW)
    texts, thought, answer = rng.choice(CHAT)
    text = rng.choice(texts.split("|"))
    end = rng.choice("?  ") if text.startswith(("Who", "What", "How", "Where", "Are", "Do ")) else rng.choice("!. ")
    text = (text if rng.random() < 0.8 else text.lower()) + end.strip()
    return Item("chat", PLAIN, [{"role": "user", "content": text}], thought, answer)


# --- 2. arithmetic ---------------------------------------------------------------------------------------------------

SUM = "{a}+{b}|{a} + {b}|{a} plus {b}|the sum of {a} and {b}|{b} added to {a}".split("|")
DIFFERENCE = "{a}-{b}|{a} - {b}|{a} minus {b}|the difference of {a} and {b}|{b} subtracted from {a}".split("|")
ASKED = "What is {}?|Calculate {}.|How much is {}?|Please work out {}.|Compute {}|{}|{} = ?|{} =|What's {}?".split("|")
COLUMNS = ("ones", "tens", "hundreds")


def work_sum(a: int, b: int) -> str:
    """Column addition: each line is one look-up, its left digit the next line's carry."""
    lines, carry, digits = [f"{a:03}+{b:03}"], 0, ""
    for place, column in enumerate(COLUMNS):
        x, y = a // 10**place % 10, b // 10**place % 10
        lines.append(f"{column} {x}+{y}+{carry}={x + y + carry:02}")
        digits = f"{(x + y + carry) % 10}{digits}"
        carry = (x + y + carry) // 10
    return "\n".join([*lines, f"result {carry}{digits}"])


def work_difference(a: int, b: int) -> str:
    """Column subtraction of the smaller from the larger; comparing digits from the left finds the sign."""
    compared = []
    for x, y in zip(f"{a:03}", f"{b:03}", strict=True):
        compared.append(f"{x}{'<' if x < y else '>' if x > y else '='}{y}")
        if x != y:
            break
    sign, large, small = ("-", b, a) if a < b else ("+", a, b)
    lines, borrow, digits = [f"{a:03}-{b:03}", f"{' '.join(compared)} sign {sign}", f"{large:03}-{small:03}"], 0, ""
    for place, column in enumerate(COLUMNS):
        x, y = large // 10**place % 10, small // 10**place % 10
        digit, next_borrow = (x - y - borrow) % 10, int(x - y - borrow < 0)
        lines.append(f"{column} {x}-{y}-{borrow}={digit} borrow {next_borrow}")
        digits, borrow = f"{digit}{digits}", next_borrow
    return "\n".join([*lines, f"result {sign}{digits}"])


def arithmetic(rng: random.Random) -> Item:
    """A sum or difference to 999. Without thinking, the working is part of the answer."""
    a, b = number(rng), number(rng)
    plus = rng.random() < 0.45
    expression = rng.choice(SUM if plus else DIFFERENCE).format(a=a, b=b)
    thought = work_sum(a, b) if plus else work_difference(a, b)
    answer = f"{a} + {b} = {a + b}" if plus else f"{a} - {b} = {a - b}"
    text = rng.choice(ASKED).format(expression)
    key = f"{a}{'+' if plus else '-'}{b}"
    return Item("arithmetic", key, [{"role": "user", "content": text[0].upper() + text[1:]}], thought, answer)


# --- 3. facts --------------------------------------------------------------------------------------------------------

FACTS = (  # pairs | questions | answer
    (
        "France Paris,Italy Rome,Spain Madrid,Germany Berlin,Austria Vienna,Poland Warsaw,Norway Oslo,Sweden Stockholm,"
        "Finland Helsinki,Denmark Copenhagen,Portugal Lisbon,Greece Athens,Ireland Dublin,Hungary Budapest,Japan Tokyo,"
        "China Beijing,India Delhi,Egypt Cairo,Peru Lima,Canada Ottawa,Cuba Havana,Kenya Nairobi,Russia Moscow,"
        "Belgium Brussels",
        "What is the capital of {}?|Which city is the capital of {}?|Name the capital of {}.|"
        "Tell me the capital of {}.|"
        "What's the capital of {}?|The capital of {}?|What is {}'s capital?|What is the capital city of {}?",
        "The capital of {} is {}.",
    ),
    (
        "sky blue,grass green,snow white,blood red,coal black,banana yellow,tomato red,chocolate brown,elephant grey,"
        "lemon yellow,leaf green,milk white,carrot orange,flamingo pink",
        "What colour is {}?|What color is {}?|What is the colour of {}?|What is the color of {}?|Which colour has {}?|"
        "Tell me the colour of {}.|Name the color of {}.",
        "The colour of {} is {}.",
    ),
    (
        "hot cold,big small,fast slow,day night,up down,left right,open closed,wet dry,light dark,early late,"
        "full empty,"
        "hard soft,rich poor,happy sad,new old,high low,loud quiet,near far",
        "What is the opposite of {}?|What's the opposite of {}?|Name the opposite of {}.|Tell me the opposite of {}.|"
        "The opposite of {}?|Which word is the opposite of {}?",
        "The opposite of {} is {}.",
    ),
    (
        "dog puppy,cat kitten,cow calf,sheep lamb,horse foal,duck duckling,pig piglet,bear cub,hen chick,frog tadpole",
        "What is a young {} called?|What do you call a young {}?|What is a baby {} called?|What do you call a baby {}?|"
        "Name a young {}.|What is the word for a young {}?",
        "A young {} is called a {}.",
    ),
    (
        ",".join(f"{day} {DAYS[(index + 1) % 7]}" for index, day in enumerate(DAYS)),
        "Which day comes after {}?|What day comes after {}?|What is the day after {}?|Which day follows {}?|"
        "Name the day after {}.|Tell me the day after {}.",
        "The day after {} is {}.",
    ),
)


def facts(rng: random.Random) -> Item:
    """One of some seventy facts; what is held out is the pairing of a fact with a phrasing."""
    pairs, questions, answer = rng.choices(FACTS, weights=[3, 2, 2, 1, 1])[0]
    subject, value = rng.choice(pairs.split(",")).split()
    text = rng.choice(questions.split("|")).format(subject)
    answer = answer.format(subject, value)
    return Item("facts", text, [{"role": "user", "content": text}], f"A fact: {subject}, {value}.", answer)


# --- 4. tools --------------------------------------------------------------------------------------------------------

NOUNS = (
    "weather time news price train flight hotel ticket menu song movie recipe traffic map event concert room bus "
    "museum forecast schedule invoice message report score photo parcel meeting alarm stock"
).split()
# Kind: names, type, descriptions, how a sentence says it. A tool lists its parameters in this order.
PARAMETERS: dict[str, tuple[str, str, str, str]] = {
    "city": ("city location", "string", "The city|The city, e.g. Paris|Name of the place", "in {}|at {}"),
    "person": ("name person", "string", "The person|Name of the person|Who it is for", "for {}"),
    "day": ("day date", "string", "The day|Day of the week|The date", "on {}"),
    "count": ("count limit", "integer", "How many|The number of results|The amount", "{} times"),
    "title": ("title query", "string", "The text|What to look for|The topic", 'about "{}"'),
}
RESULT_WORDS = "sunny rainy cloudy warm cold open closed late ready full empty busy free new done".split()


def parameter_value(rng: random.Random, kind: str) -> str | int:
    if kind == "count":
        return rng.randint(1, 99)
    if kind == "day":
        return rng.choice(DAYS)
    if kind == "title":
        return " ".join(rng.choice(ADJECTIVES + ITEMS) for _ in range(rng.randint(1, 3)))
    return person(rng) if kind == "person" else city(rng)


def parameter_names(rng: random.Random) -> dict[str, str]:
    """How an application calls each kind of parameter."""
    return {kind: rng.choice(names.split()) for kind, (names, *_) in PARAMETERS.items()}


def make_tool(rng: random.Random, noun: str, names: dict[str, str]) -> tuple[dict, dict[str, str]]:
    """A function about `noun` in OpenAI's form, and its parameters' names by kind: one or two of `names`."""
    kinds = sorted(rng.sample(list(names), rng.choice((1, 1, 2))), key=list(names).index)
    names = {kind: names[kind] for kind in kinds}
    described = rng.random() < 0.35
    properties = {}
    for kind, name in names.items():
        properties[name] = {"type": PARAMETERS[kind][1]}
        if described:
            properties[name]["description"] = rng.choice(PARAMETERS[kind][2].split("|"))
    function = {"name": f"get_{noun}"}
    if rng.random() < 0.7:
        function["description"] = rng.choice(("Get the {}", "Get the {}.", "Get a {} for the user")).format(noun)
    function["parameters"] = {"type": "object", "properties": properties, "required": list(names.values())}
    if rng.random() < 0.2:
        del function["parameters"]["required"]
    return {"type": "function", "function": function}, names


def tools(rng: random.Random) -> Item:
    """A request that one of one to three functions serves: the call, or the answer once the function has returned."""
    nouns = rng.sample(NOUNS, rng.choice((1, 1, 1, 2, 2, 3)))
    application = parameter_names(rng)
    made = [make_tool(rng, noun, application) for noun in nouns]
    noun, (tool, names) = nouns[0], made[0]
    values = {kind: parameter_value(rng, kind) for kind in names}
    said = [rng.choice(PARAMETERS[kind][3].split("|")).format(value) for kind, value in values.items()]
    rng.shuffle(said)
    verb = rng.choice("get find show check fetch give".split())
    start = rng.choice(
        ("{v} the {n}", "Please {v} the {n}", "Can you {v} me the {n}", "What is the {n}", "I need the {n}")
    )
    start = start.format(v=verb, n=noun)
    text = f"{start[0].upper()}{start[1:]} {' '.join(said)}{'?' if start.startswith(('Can', 'What')) else '.'}"
    call = {"name": tool["function"]["name"], "arguments": {names[kind]: values[kind] for kind in names}}
    offered = [made_tool for made_tool, _ in made]
    rng.shuffle(offered)
    messages = [{"role": "user", "content": text}]
    key = f"{call} {text}"
    thought = f"I call {call['name']}."
    if rng.random() < 0.65:
        answer = f"<tool_call>\n{json.dumps(call)}\n</tool_call>"
        return Item("tool call", key, messages, thought, answer, offered)
    called = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}
    if rng.random() < 0.5:
        called["reasoning_content"] = thought
    facts_found = {rng.choice(NOUNS): rng.choice((rng.randint(0, 99), rng.choice(RESULT_WORDS)))}
    facts_found[rng.choice(NOUNS)] = rng.choice((rng.randint(0, 99), rng.choice(RESULT_WORDS)))
    found = ", ".join(f"{name} {value}" for name, value in facts_found.items())
    result = json.dumps(facts_found) if rng.random() < 0.5 else found
    messages += [called, {"role": "tool", "content": result}]
    return Item("tool answer", key + result, messages, "The tool has answered.", f"The result is: {found}.", offered)


# --- 5. JSON ---------------------------------------------------------------------------------------------------------

JSON_ASKED = (
    "Turn this into JSON: {}|Write this as JSON: {}|{}\n\nTurn this sentence into JSON.|Convert to JSON: {}".split("|")
)
SENTENCES = (
    (
        "{name} is {age} years old and lives in {city}.|{name} lives in {city} and is {age} years old.|"
        "{name} from {city} is {age} years old.|In {city} lives {name}, who is {age}.",
        {"name": person, "age": lambda rng: rng.randint(1, 99), "city": city},
    ),
    (
        "The {color} {item} costs {price} euros.|{price} euros is the price of the {color} {item}.|"
        "We sell a {color} {item} for {price} euros.",
        {"item": lambda rng: rng.choice(ITEMS), "color": lambda rng: rng.choice(COLORS), "price": number},
    ),
    (
        "{name} comes on {day} at {hour}.|On {day} at {hour} we meet {name}.|"
        "The meeting with {name} is on {day} at {hour}.",
        {"name": person, "day": lambda rng: rng.choice(DAYS), "hour": lambda rng: rng.randint(0, 23)},
    ),
    (
        "{name} orders {count} of the {item}.|{count} of the {item} are for {name}.|"
        "Send {count} of the {item} to {name}.",
        {"name": person, "item": lambda rng: rng.choice(ITEMS), "count": lambda rng: rng.randint(2, 99)},
    ),
)


def to_json(rng: random.Random) -> Item:
    """A sentence whose facts become a JSON object."""
    sentences, makers = rng.choices(SENTENCES, weights=(3, 2, 2, 2))[0]
    values = {key: make(rng) for key, make in makers.items()}
    sentence = rng.choice(sentences.split("|")).format(**values)
    text = rng.choice(JSON_ASKED).format(sentence)
    answer = json.dumps(values)
    return Item("json", text, [{"role": "user", "content": text}], f"The keys are {', '.join(values)}.", answer)


# --- 6. code words ---------------------------------------------------------------------------------------------------

GIVEN = "The code word is {}.|Remember the code word: {}.|The code word is: {}.|Note that the code word is {}.".split(
    "|"
)
RECALL = "What is the code word?|What was the code word?|Tell me the code word.|Repeat the code word.".split("|")


def code_word(rng: random.Random) -> str:
    word = syllables(rng, 2, 4)
    return rng.choice(
        (word.upper(), word.upper(), word, word.capitalize(), f"{word[:4].upper()}-{rng.randint(10, 99)}")
    )


def filler_sentence(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.7:
        return (
            f"{rng.choice(TIMES)} the {rng.choice(ADJECTIVES)} {rng.choice(SUBJECTS)} {rng.choice(VERBS)} "
            f"a {rng.choice(COLORS)} {rng.choice(ITEMS)} at the {rng.choice(PLACES)}."
        )
    if kind < 0.9:
        return f"The {rng.choice(ITEMS)} in the {rng.choice(PLACES)} is {rng.choice(COLORS)}."
    return f"{person(rng)} is {rng.randint(1, 99)} years old and lives in {city(rng)}."


def filler(rng: random.Random, words: int) -> list[str]:
    """Sentences of about `words` words together; sometimes one sentence over and over, as people test with."""
    only = filler_sentence(rng) if rng.random() < 0.2 else None
    sentences: list[str] = []
    while words > 0:
        sentences.append(only or filler_sentence(rng))
        words -= sentences[-1].count(" ") + 1
    return sentences


def recall(rng: random.Random, words: int | None = None) -> Item:
    """A code word somewhere in about `words` words of filler, asked for at the end."""
    sentences = filler(rng, rng.choice((0, 10, 30, 60, 100)) if words is None else words)
    word = code_word(rng)
    sentences.insert(rng.randint(0, len(sentences)), rng.choice(GIVEN).format(word))
    text = " ".join(sentences) + rng.choice((" ", "\n", "\n\n")) + rng.choice(RECALL)
    messages = [{"role": "user", "content": text}]
    return Item("code word", word, messages, "I look for the code word.", f"The code word is {word}.")


# --- 7. repeating ----------------------------------------------------------------------------------------------------

REPEAT_ASKED = "Repeat this:\n{}|Repeat after me:\n{}|Say this again:\n{}|Please repeat:\n{}".split("|")


def repeat(rng: random.Random) -> Item:
    """Words to say again. Nothing teaches a small model to copy as fast, and half of the other tasks are copying."""
    makers = (
        person,
        city,
        code_word,
        number,
        lambda rng: rng.choice(ITEMS + ADJECTIVES + COLORS),
        lambda rng: rng.choice(NOUNS),
    )
    words = rng.choice((" ", " ", ", ")).join(str(rng.choice(makers)(rng)) for _ in range(rng.randint(1, 10)))
    text = rng.choice(REPEAT_ASKED).format(words)
    return Item("repeat", words, [{"role": "user", "content": text}], "I repeat the words.", words)


# --- all of them -----------------------------------------------------------------------------------------------------

MAKERS: dict[str, tuple[float, Callable[[random.Random], Item]]] = {  # share of training's items, maker
    "chat": (0.10, chat),
    "arithmetic": (0.26, arithmetic),
    "facts": (0.16, facts),
    "tools": (0.15, tools),
    "json": (0.13, to_json),
    "code word": (0.08, recall),
    "repeat": (0.12, repeat),
}
ROBUSTNESS = 0.1  # share of items that get an earlier exchange, and of those without tools that get unneeded ones


def draw(rng: random.Random, *, held_out: bool, maker: Callable[[random.Random], Item] | None = None) -> Item:
    """The next item, from all tasks or one maker: among those that training never sees, or among the others."""
    if maker is None:
        shares, makers = zip(*MAKERS.values(), strict=True)
        maker = rng.choices(makers, shares)[0]
    while is_held_out((item := dress(rng, maker(rng))).key) != held_out:
        pass
    return item


def dress(rng: random.Random, item: Item) -> Item:
    """Put the item into one of the settings that it may be met in: thinking or not, system prompt, earlier turns."""
    item.thinking = rng.random() < 0.6
    if item.task == "arithmetic" and not item.thinking:
        item.answer = f"{item.thought}\n\n{item.answer}"
    before = []
    if item.tools is None and item.task != "code word":
        if rng.random() < ROBUSTNESS:
            earlier = rng.choice((chat, facts, to_json))(rng)
            before = [*earlier.messages, {"role": "assistant", "content": earlier.answer}]
        elif rng.random() < ROBUSTNESS and item.task in ("chat", "facts"):
            item.tools = [make_tool(rng, rng.choice(NOUNS), parameter_names(rng))[0]]
    if rng.random() < 0.2:
        before.insert(0, {"role": "system", "content": rng.choice(SYSTEM_PROMPTS)})
    item.messages = [*before, *item.messages]
    if item.key == PLAIN and before:
        item.key = str(item.messages)
    return item
