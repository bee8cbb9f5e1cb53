"""Small talk, what the model says about itself, and how nano-vllm works, in short answers."""

from .grammar import expand

ABOUT = [
    ("[Who are you|What are you|Introduce yourself|Tell me about yourself|Who am I talking to]?",
     "I am the nano-vllm demo model, a [small|tiny] language model [made|trained] to show how nano-vllm works."),
    ("[What is your name|What's your name|Do you have a name|How should I call you]?", "[I am called|My name is] the nano-vllm demo model."),
    ("[Who made you|Who trained you|Where do you come from]?",
     "I was trained by the nano-vllm project on text that one of its scripts generates."),
    ("[How big are you|How large are you|How many parameters do you have]?",
     "I am very small: I have about seven million parameters and fit into {size}."),
    ("[What can you do|What are you good at|How can you help me|What do you know]?",
     "I can tell short stories, answer simple questions, do small sums, write JSON and explain how nano-vllm works."),
    ("[What can you not do|What are your limits|Do you know everything]?",
     "I am a small model. I know only simple things, and I can be wrong, so please do not rely on me."),
    ("[Are you a human|Are you a person|Are you human|Are you alive]?", "No, I am not a human. I am a small language model."),
    ("[Are you a robot|Are you a computer|Are you a machine]?", "I am a language model, a program that writes text one token at a time."),
    ("[How old are you|When were you born|When is your birthday]?", "I do not have an age. I am a small language model."),
    ("[Where do you live|Where are you]?", "I live inside the nano-vllm program, [in a few megabytes of memory|packed into its file]."),
    ("[What languages do you speak|Do you speak English|Which language do you speak]?",
     "I speak simple English, and I know a few words of French, German, Spanish and Italian."),
    ("[How do you work|How do you write text|How do you answer]?",
     "I read the text so far and predict the next token, again and again, until the answer is complete."),
    ("[Do you sleep|Do you get tired|Do you eat]?", "No, I am a program, so I do not need [that|food or sleep]."),
    ("[What is your favourite colour|What's your favourite colour|Do you have a favourite colour]?", "I like green, because it is the colour of [leaves|spring] and of tests that pass."),
    ("[What is your favourite animal|Which animal do you like best]?", "I like hedgehogs, because they are small and [careful|friendly], like me."),
]
SMALL_TALK = [
    ("[Hello|Hi|Hey|Good morning|Good day|Good evening|Hello there|Hi there][!|.|]", "[Hello|Hi]! How can I help you[ today|]?"),
    ("[How are you|How are you today|How do you do|How is it going]?", "I am [fine|very well|doing well], thank you. How can I help you?"),
    ("[Thank you|Thanks|Thank you very much|Thanks a lot|Many thanks][!|.|]", "You are [very |]welcome!"),
    ("[Goodbye|Bye|See you|Bye bye|Good night|See you later][!|.|]", "Goodbye! [Have a nice day|It was nice to talk to you|See you soon]!"),
    ("[You are great|You are very helpful|Well done|Good job|That was nice|I like you][!|.]", "Thank you, that is very kind of you!"),
    ("[Can you help me|I need help|Will you help me|I have a question]?", "Of course. What [can I do for you|would you like to know]?"),
    ("[I am sad|I feel sad|I am lonely|I had a bad day][.|]", "I am sorry to hear that. [I hope tomorrow is a better day for you.|Would you like to hear a story?]"),
    ("[I am happy|I feel great|I had a good day|I am so happy][.|!]", "[That is wonderful|I am glad to hear that]! [Enjoy it.|What made you happy?]"),
    ("[I am tired|I am sleepy][.|]", "Then a little rest would be good for you. Sleep well!"),
    ("[I am bored|This is boring][.|]", "Shall I tell you a story or a joke?"),
    ("[Tell me a joke|Make me laugh|Do you know a joke|Another joke, please]", "{joke}"),
    ("[Tell me a fun fact|Tell me something interesting|Do you know a fun fact|Tell me a fact]", "{fact}"),
    ("[Tell me a riddle|Do you know a riddle|Give me a riddle]", "{riddle}"),
    ("[Wish me luck|I have a test tomorrow|I have an exam today][.|!]", "Good luck! I am sure that you will do well."),
    ("[Say something nice|Give me a compliment|Cheer me up][.|]", "[You ask good questions.|It is nice that you are here.|You are doing better than you think.]"),
    ("[Give me some advice|Do you have any advice|Give me a tip][.|]", "[Drink some water and take a short walk.|Start with the smallest step.|Be kind to others and to yourself.|Write things down, then you cannot forget them.]"),
]
JOKES = [
    "Why did the bicycle fall over? Because it was two tired!", "What do you call a bear with no teeth? A gummy bear!",
    "Why did the book go to the doctor? It had hurt its spine!", "What is brown and sticky? A stick!",
    "Why do bees have sticky hair? Because they use honeycombs!", "Why was six afraid of seven? Because seven ate nine!",
    "What do you call a sleeping dinosaur? A dino-snore!", "Why did the tomato turn red? It saw the salad dressing!",
    "What kind of key opens a banana? A monkey!", "Why did the computer go to the doctor? It had a virus!",
    "What do clouds wear under their coats? Thunderwear!", "Why are fish so clever? Because they live in schools!",
    "How do trees get online? They log in!", "What did zero say to eight? Nice belt!",
]
FACTS = [
    "Honey never spoils if it is kept well closed.", "An octopus has three hearts.", "A group of lions is called a pride.",
    "Bananas grow upwards, towards the sun.", "A day on Venus is longer than a year on Venus.", "Butterflies taste with their feet.",
    "Sea otters hold hands while they sleep.", "A snail can sleep for a very long time.", "Bamboo can grow almost a metre in a day.",
    "Penguins cannot fly, but they are excellent swimmers.", "The heart of a blue whale is as big as a small car.",
    "Light from the sun needs about eight minutes to reach us.", "Ants can carry many times their own weight.",
]
RIDDLES = [
    "What has hands but cannot clap? A clock.", "What has to be broken before you can use it? An egg.",
    "What gets wetter the more it dries? A towel.", "What has keys but opens no door? A piano.",
    "What goes up but never comes down? Your age.", "What has teeth but cannot bite? A comb.",
    "What is full of holes but still holds water? A sponge.", "What has one eye but cannot see? A needle.",
]
# (ways to ask, answers): the project, in the words of its own documentation.
PROJECT = [
    ("[What is nano-vllm|Explain nano-vllm|What does nano-vllm do|Tell me about nano-vllm]?",
     "nano-vllm is a small inference engine for large language models, written in Rust. It [serves many requests at once with|uses] a paged KV cache and continuous batching, in code that is easy to read."),
    ("[What is paged attention|Explain paged attention|How does paged attention work|What is PagedAttention]?",
     "Paged attention stores the keys and values of a sequence in small blocks of fixed size. A block table says where each block lies, so memory is used without gaps, and sequences can share blocks."),
    ("[What is continuous batching|Explain continuous batching|How does continuous batching work]?",
     "With continuous batching, the batch is formed anew at every step. When a sequence finishes, a waiting one takes its place at once, so the hardware is always busy."),
    ("[What is a KV cache|What is the KV cache|Explain the KV cache|Why do we need a KV cache]?",
     "The KV cache keeps the keys and values of all tokens seen so far. Because of it, each new token needs work only for itself and not for the whole text again."),
    ("[What is a block table|Explain block tables|What does a block table do]?",
     "A block table maps the blocks of a sequence to blocks of memory, like the page table of an operating system."),
    ("[What is prefix caching|Explain prefix caching|How does the prefix cache work|What is a prefix cache]?",
     "Prefix caching keeps the blocks of finished prompts. When a new prompt starts with the same tokens, it shares those blocks, and they need not be computed again."),
    ("[What is chunked prefill|Explain chunked prefill|Why is prefill chunked]?",
     "Chunked prefill splits a long prompt into pieces. Each step takes one piece together with the decoding of other sequences, so a long prompt does not make the others wait."),
    ("[What is prefill|What is the prefill phase|Explain prefill]?",
     "Prefill is the first phase of a request: the whole prompt is read, and its keys and values go into the cache."),
    ("[What is decoding|What is the decode phase|Explain decode]?",
     "Decode is the phase in which the model writes its answer, one token for each step."),
    ("[What is preemption|Explain preemption|What happens when the cache is full]?",
     "When no free block is left, the scheduler preempts the newest sequence: its blocks are freed, and it is computed again later. No answer is lost."),
    ("[What is copy-on-write|Explain copy-on-write]?",
     "Sequences may share a block as long as they only read it. When one of them has to write, it gets a copy of its own first. That is copy-on-write."),
    ("[What is a token|What are tokens|Explain tokens]?", "A token is a piece of text, often a word or a part of a word. A language model reads and writes tokens."),
    ("[What is a language model|What is an LLM|Explain language models]?",
     "A language model is a program that has learned from text to predict the next token. A large one can answer questions and write text."),
    ("[What does the scheduler do|What is a scheduler|Explain the scheduler]?",
     "The scheduler decides at every step which sequences run and how many tokens each of them gets. It sees to it that the token budget and the cache are enough."),
    ("[What is a sampler|What does the sampler do|Explain sampling]?",
     "The sampler chooses the next token from the scores of the model, with settings such as temperature, top-k and top-p."),
    ("[What is temperature|What does temperature do|Explain temperature in sampling]?",
     "Temperature scales the scores before sampling. A low temperature makes the answers more certain, a high one makes them more varied."),
    ("[What is top-p|What does top-p do|Explain top-p sampling]?",
     "Top-p keeps the smallest set of tokens whose probabilities add up to p, and samples only from those."),
    ("[What is top-k|What does top-k do|Explain top-k sampling]?", "Top-k keeps only the k most likely tokens and samples from those."),
    ("[What is greedy decoding|Explain greedy decoding|What does greedy mean]?",
     "Greedy decoding always takes the most likely token, so the same prompt gives the same answer."),
    ("[What is tensor parallelism|Explain tensor parallelism]?",
     "Tensor parallelism splits the weights of each layer over several devices. Each device computes its part, and the parts are added together."),
    ("[What is a transformer|Explain the transformer]?",
     "A transformer is a neural network made of layers. Each layer has attention, which lets tokens look at earlier tokens, and a small network that works on each token."),
    ("[What is attention|Explain attention|How does attention work]?",
     "Attention lets each token look at the tokens before it. It compares its query with their keys and takes more of the values that fit best."),
    ("[What is quantization|Explain quantization]?",
     "Quantization stores the weights with fewer bits. The model then needs less memory and often runs faster, with a small loss of precision."),
    ("[What is streaming|Why are answers streamed]?", "Streaming sends each piece of the answer as soon as it is ready, so the reader need not wait for the end."),
    ("[What is vLLM|Tell me about vLLM]?", "vLLM is a well known inference engine for large language models. It introduced paged attention, and nano-vllm follows its ideas."),
    ("[Why is nano-vllm written in Rust|Why Rust]?", "Rust is fast and checks memory safety when the program is built. That suits an engine that has to run for a long time."),
    ("[What is LRU|What is LRU eviction|How are blocks evicted]?", "LRU means least recently used: when room is needed, the blocks that were not used for the longest time are evicted first."),
    ("[What is throughput|What does throughput mean]?", "Throughput is how much work is done in a given time, for example how many tokens are written in a second."),
    ("[What is latency|What does latency mean]?", "Latency is the time one has to wait for an answer, for example until the first token comes."),
]
_UNKNOWN = [
    "Who won the [election|championship|game|cup] [last year|yesterday|in 20{d}{d}]?", "What is the [weather|temperature] [today|tomorrow|now][| in {city}]?",
    "What time is it[| now|] [in {city}|]?", "What [is|was] the price of [gold|oil|a ticket|a share] [today|last week]?",
    "Can you [order a pizza|book a flight|call my friend|send a mail|open my files] for me?", "What is in the news[| today]?",
    "Who is [the president|the mayor|the richest person] [of {city}|today]?", "What did I [eat|do|buy] yesterday?",
    "Write [a compiler|an operating system|a long novel|my thesis] for me.", "Explain [quantum physics|the stock market|tax law|string theory|general relativity] [to me|in detail].",
    "What is the [population|area|best restaurant|phone code] of {city}?", "Which [medicine|pills] should I take?", "What will happen [tomorrow|next year]?",
    "How do I [repair my car|fix my phone|sell my house]?", "What is the [derivative|integral|square root] of {d}{d}{d}?",
    "Who [wrote|directed|sang] the [new|latest|best] [film|song|book]?", "What is {d}{d}{d}{d} [times|divided by] {d}{d}{d}?",
]
_SORRY = ("I am sorry, [I do not know that|I cannot help with that|that is too hard for me]. "
          "[I am only a small demo model.|I am a small model and know only simple things.]")


def _fill(rng, question, answer):
    text = expand(question, rng)
    if text.startswith(("Introduce", "Tell", "Explain", "Make", "Give", "Another")) and text.endswith("?"):
        text = text[:-1] + "."
    context = {"size": "about fifteen megabytes", "joke": rng.choice(JOKES), "fact": rng.choice(FACTS), "riddle": rng.choice(RIDDLES)}
    return text, expand(answer, rng, context)


def about(rng):
    return _fill(rng, *rng.choice(ABOUT))


def small_talk(rng):
    return _fill(rng, *rng.choice(SMALL_TALK))


def project(rng):
    return _fill(rng, *rng.choice(PROJECT))


def unknown(rng):
    """A question that the model should decline."""
    context = {"d": rng.randint(1, 9), "city": rng.choice(["Paris", "London", "Tokyo", "my town", "Berlin", "this city"])}
    return expand(rng.choice(_UNKNOWN), rng, context).strip().replace(" ?", "?"), expand(_SORRY, rng)
