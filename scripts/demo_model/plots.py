"""Plots of the short stories: each a list of sentences in template notation.

Slots: {hero} and {friend} are names, {kind} and {fkind} what they are; {he} {him} {his} and
{fhe} {fhim} {fhis} their pronouns; {thing} a coloured toy, {place} and {where} a place, {spot}
a hiding place there, {treat} something to eat, {parent} and {teacher} grown-ups.
"""

# plot name -> (themes a request may name, paragraphs of sentences, morals)
PLOTS = {
    "lost": (
        ["friendship", "a lost {toy}", "losing something", "helping"],
        [
            [
                "{^he} had {a_thing} that {he} [loved more than anything|took everywhere|had got for {his} birthday].",
                "[One {weather} {time}|One day], {hero} went to {place} [to play|for a walk] and [took|carried] the {toy} along.",
                "But when it was time to go home, the {toy} was gone!",
            ],
            [
                "{hero} looked [here and there|left and right|everywhere], but {he} could not find it.",
                "[A tear rolled down {his} cheek.|{^he} sat down and felt very sad.|\"Oh no,\" {he} said. \"What shall I do?\"]",
                "[Just then|At that moment], {friend} the {fkind} came by. \"[What is wrong|Why are you so sad], {hero}?\" {fhe} asked.",
                "\"I lost my {thing},\" said {hero}.",
                "\"[Do not worry|Do not cry|Cheer up],\" said {friend}. \"[Let us look together|Two can look better than one|I will help you find it].\"",
            ],
            [
                "They [looked|searched] [high and low|step by step|in every corner], and [soon|after a while|at last] {friend} [called|shouted], \"Look over there!\"",
                "The {toy} was {spot}.",
                "{hero} [hugged {friend}|jumped for joy|laughed with joy] and said, \"Thank you! You are a [true|good|wonderful] friend.\"",
                "[Then they played with the {toy} together until the sun went down.|They walked home side by side and shared {treat}.|After that, {hero} always took good care of the {toy}.]",
            ],
        ],
        ["A good friend helps you when you are sad.", "It is easier to find something when you look together.",
         "Asking for help is a good idea."],
    ),
    "fear": (
        ["being brave", "courage", "being afraid"],
        [
            [
                "{hero} [was not afraid of many things|liked almost everything], but {he} was afraid of {fear}.",
                "Whenever {he} [thought of it|had to face it], {his} [knees shook|heart beat fast|hands felt cold].",
            ],
            [
                "[One {weather} {time}|One day], {friend} the {fkind} [came to visit|knocked at the door] and [saw that {hero} was hiding|asked {hero} to come along].",
                "\"I cannot,\" said {hero} [quietly|in a small voice]. \"I am afraid of {fear}.\"",
                "\"I was afraid of that too,\" said {friend}. \"[Take my hand and we will try together|We can take one small step at a time|Take a deep breath and count to three].\"",
            ],
            [
                "{hero} [took a deep breath|closed {his} eyes for a moment|counted to three]. [Step by step|Slowly|Little by little], {he} [tried|dared to try].",
                "[Nothing bad happened.|It was not as bad as {he} had thought.|And then something wonderful happened: the fear grew smaller.]",
                "\"I did it!\" [cried|shouted|called] {hero}. {friend} [clapped and laughed|smiled|cheered].",
                "[That night|That evening], {hero} [slept very well|fell asleep with a smile|felt very proud].",
            ],
        ],
        ["Being brave means trying even when you are afraid.", "Fear gets smaller when you share it with a friend.",
         "One small step is often enough to begin."],
    ),
    "honest": (
        ["telling the truth", "honesty", "a mistake"],
        [
            [
                "[One {weather} {time}|One day], {hero} was playing [inside|in the kitchen|near the window] with {a_thing}.",
                "{^he} [jumped|ran|turned] too fast, and [crash|bang|bump]! {^parent}'s favourite [vase|cup|plate|bowl] fell to the floor and broke.",
                "{hero} [was scared|felt terrible|did not know what to do]. \"[If I hide the pieces, nobody will know|Maybe I can hide it],\" {he} thought.",
            ],
            [
                "But {his} [tummy|heart] felt heavy [all day|all afternoon]. {^he} could not [eat|play|laugh].",
                "{friend} the {fkind} [looked at {him}|saw how sad {he} was] and said, \"[Just tell the truth|Say what happened]. You will feel better.\"",
                "So {hero} went to {parent} and said, \"I am sorry. I broke it. It was my fault.\"",
            ],
            [
                "{^parent} [was quiet for a moment|took a deep breath] and then [smiled|gave {him} a hug]. \"Thank you for telling me the truth,\" {parent} said. \"[That was brave|That matters more than anything that can break].\"",
                "Together they [cleaned up the pieces|glued the pieces together|swept the floor], and then they ate {treat}.",
                "{hero} felt [as light as a feather|happy again|much better].",
            ],
        ],
        ["Telling the truth makes the heart light.", "Everyone makes mistakes, and it is good to be honest about them."],
    ),
    "share": (
        ["sharing", "friendship", "a {toy}"],
        [
            [
                "{hero} had {a_thing}, and it was the [finest|prettiest|best] {toy} [far and wide|{where}].",
                "[One {weather} {time}|One day], {friend} the {fkind} asked, \"May I play with it too?\"",
                "\"No,\" said {hero}. \"It is mine, only mine.\" So {friend} [went away|walked home] [sadly|with {fhis} head down].",
            ],
            [
                "{hero} played alone. At first it was [nice|fun], but [soon|after a while] it was [boring|very quiet|no fun at all].",
                "{^he} looked at the {toy} and thought, \"[What is the use of a {toy} when nobody laughs with me?|A {toy} is no fun without a friend.]\"",
            ],
            [
                "So {hero} [ran|hurried] to {friend} and said, \"I am sorry. [Let us play together!|Would you like to play with me?]\"",
                "{^friend} [smiled|beamed|nodded happily], and they took turns [all afternoon|until the stars came out|until it was dark].",
                "It was the [best|happiest] day that {hero} could remember.",
            ],
        ],
        ["Things are more fun when we share them.", "When you share your joy, it grows."],
    ),
    "return": (
        ["honesty", "kindness", "finding something"],
        [
            [
                "[One {weather} {time}|One day], {hero} [was walking|went for a walk] {where} when {he} saw something [shiny|strange|bright] {spot}.",
                "It was {a_thing}! \"[How pretty|How lovely],\" {he} said. \"I wonder whose it is.\"",
                "{hero} wanted to keep it, but {he} knew that somebody must be [looking for it|missing it].",
            ],
            [
                "So {he} [went from door to door|asked everyone {he} met]. \"Is this your {toy}?\" {he} asked [the baker|the farmer|the old woman], but {they_not}.",
                "At last {he} met {friend} the {fkind}, who was [crying|looking under every stone|very sad].",
                "\"[Is this yours|Are you looking for this]?\" asked {hero}. {^friend}'s eyes [shone|grew wide]. \"Yes! [My grandmother gave it to me|I lost it yesterday]. Thank you so much!\"",
            ],
            [
                "To say thanks, {friend} [baked {treat}|invited {hero} to eat {treat}|shared {treat} with {hero}].",
                "{hero} did not have the {toy}, but now {he} had a new friend, and that was much better.",
            ],
        ],
        ["Giving back what is not yours brings good things.", "Kindness always comes back to you."],
    ),
    "build": (
        ["trying again", "patience", "building something", "not giving up"],
        [
            [
                "[One {weather} {time}|One day], {hero} had an idea. \"I will build {a_project}!\" {he} said.",
                "{^he} collected [wood and rope|boards and nails|sticks, paper and glue] and worked all [morning|day].",
                "But when {he} [tried it|was done], it [fell apart|broke|tipped over] with a loud [crack|crash].",
            ],
            [
                "{hero} [kicked a stone|sat down|sighed]. \"[I will never do it|I give up],\" {he} said.",
                "{friend} the {fkind} had seen it all. \"[The first time is never perfect|Even the best builders need to try twice],\" {fhe} said. \"What did you learn?\"",
                "{hero} thought about it. \"It needs [a stronger bottom|more rope|a better plan],\" {he} said.",
            ],
            [
                "They [drew a plan|made a plan] and tried again. It [wobbled|was not easy], but this time it [held|worked]!",
                "{hero} [danced around it|laughed out loud|was so proud]. [All the neighbours came to see {the_project}.|They gave {the_project} a name and painted it {colour}.]",
            ],
        ],
        ["If you fail the first time, try again.", "We learn from our mistakes.", "Good things take time."],
    ),
    "newcomer": (
        ["friendship", "a new friend", "being shy", "kindness"],
        [
            [
                "[One {weather} {time}|One day], somebody new came to {place}. It was {friend}, {a_fkind} who [did not know anybody|was very shy|had come from far away].",
                "{friend} sat [alone|all alone] {spot} and [looked at the ground|watched the others play].",
            ],
            [
                "{hero} saw {fhim} and thought, \"[It must be hard to be new|I know how it feels to be alone].\"",
                "So {he} went over and said, \"Hello! I am {hero}. [Would you like to play with my {thing}|Do you want to share {treat} with me]?\"",
                "{friend} [looked up|blinked] and [slowly|shyly] began to smile. \"[Yes, please|I would love to],\" {fhe} said.",
            ],
            [
                "[They played until the evening|Soon they were laughing together|They talked and talked], and {hero} showed {friend} all [the best places|the secret paths] {where}.",
                "The next day, {friend} was not shy any more, because now {fhe} had a friend.",
            ],
        ],
        ["A friendly word can change a whole day.", "Be kind to those who are new."],
    ),
    "rescue": (
        ["kindness", "helping", "small helpers"],
        [
            [
                "[One {weather} {time}|One day], {hero} heard a [small|tiny|soft] voice {where}. \"Help! Help!\"",
                "{^he} looked around and saw {a_small} that [had fallen into a puddle|was stuck under a branch|was caught in a net].",
                "[Carefully|Gently|Without waiting], {hero} [lifted it up and set it free|helped it out].",
            ],
            [
                "\"Thank you,\" said the {small}. \"One day I will help you.\"",
                "{hero} [laughed|smiled]. \"You are so small! How could you help me?\" But {he} [waved and went on|wished it a good day].",
                "[A week later|Some days later], {hero} [got lost in the fog|lost the way home|could not find the path].",
            ],
            [
                "[All at once|Suddenly] {he} heard a voice {he} knew. It was the {small}! \"Follow me,\" it said, \"I know the way.\"",
                "And [step by step|in no time], the {small} [led|brought] {hero} home.",
                "\"[I was wrong|Now I know],\" said {hero}. \"Even the smallest friend can be a great help.\"",
            ],
        ],
        ["No act of kindness is ever too small.", "Even small friends can do great things."],
    ),
    "race": (
        ["a race", "being proud", "kindness"],
        [
            [
                "{hero} was [fast|very fast], and {he} [knew it|told everybody about it]. \"Nobody can beat me!\" {he} said every day.",
                "[One {weather} {time}|One day], there was a big race {where}. {friend} the {fkind} wanted to run too.",
                "\"You?\" laughed {hero}. \"You are much too slow.\" {^friend} [said nothing|only smiled].",
            ],
            [
                "\"[Ready, steady, go|One, two, three, go]!\" {hero} ran [ahead|like the wind]. [Halfway|Near the end], {he} looked back to laugh, [tripped over a root|slipped on a wet stone] and fell.",
                "\"Ouch! My foot!\" {he} cried. The others ran past. Only {friend} stopped.",
                "\"[Lean on me|Take my hand],\" said {friend}. \"We will finish together.\"",
            ],
            [
                "They came in last, but everybody [cheered|clapped] [loudly|for them].",
                "\"I am sorry that I laughed at you,\" said {hero}. \"You are the real winner.\"",
                "[Then they all ate {treat} together.|From that day on they were best friends.]",
            ],
        ],
        ["Being kind is better than being first.", "It is not nice to laugh at others."],
    ),
    "seed": (
        ["patience", "a garden", "waiting"],
        [
            [
                "[One spring day|One {weather} morning], {parent} gave {hero} a [tiny|small] seed. \"Plant it and be patient,\" {parent} said.",
                "{hero} planted the seed in [a pot|the garden|the soft earth] and gave it water. Then {he} [sat down and waited|watched it].",
                "Nothing happened. {^he} waited [one day, two days, three days|the whole week]. Still nothing!",
            ],
            [
                "\"[It does not work|My seed is asleep],\" {hero} told {friend} the {fkind}. \"I will dig it up.\"",
                "\"No, wait,\" said {friend}. \"[Good things grow slowly|It is working under the ground where you cannot see it]. Give it water and sun.\"",
                "So {hero} [sang to the seed|gave it water every morning] and [waited|tried to be patient].",
            ],
            [
                "Then, one [bright|warm|sunny] morning, there was a [small|tiny] green leaf! It grew and grew, and [in summer|at last] it became {a_plant}.",
                "\"You were right,\" {hero} said to {friend}. \"It was worth the wait.\"",
            ],
        ],
        ["Good things grow slowly.", "Patience is a quiet kind of strength."],
    ),
    "baking": (
        ["a birthday", "a cake", "laughing about a mistake"],
        [
            [
                "It was {friend}'s birthday, and {hero} wanted to bake a cake for {fhim}.",
                "{^he} [mixed|stirred together] flour, eggs and milk. Then {he} [took|poured in] a big cup of sugar. But it was not sugar. It was salt!",
                "The cake looked [lovely|wonderful], with [cherries|candles|berries] on top.",
            ],
            [
                "[In the afternoon|Later], {friend} the {fkind} took the first bite. {^fhis} face turned [green|red|pale]. \"It is very... interesting,\" {fhe} said [politely|kindly].",
                "{hero} tried it too. \"Yuck! I used salt!\" {he} cried. [For a moment it was quiet|They looked at each other], and then they both [laughed|laughed until their tummies hurt].",
            ],
            [
                "\"Let us bake a new one together,\" said {friend}. \"That is the best present of all.\"",
                "The second cake was [sweet and soft|perfect], and they ate it with {treat}.",
                "[Every year they told the story of the salty cake.|It was the funniest birthday ever.]",
            ],
        ],
        ["A mistake can become a happy memory.", "It is good to laugh about yourself."],
    ),
    "lost_way": (
        ["being lost", "listening", "a walk", "an adventure"],
        [
            [
                "\"Stay on the path,\" said {parent} when {hero} went to {place}. But {hero} saw a [blue butterfly|white feather in the wind|shiny beetle] and followed it.",
                "[Soon|Before long] the path was gone. Everything looked [strange|the same], and it was getting dark.",
            ],
            [
                "\"Hello?\" called {hero}. Nobody answered. {^he} felt [small|cold and alone].",
                "Then {he} remembered what {parent} had said: \"If you are lost, stay calm and [follow the water|look for the brightest star|stay where you are and call].\"",
                "{hero} [did just that|took a deep breath and did it]. [After a while|Soon], {he} saw a light. It was {friend} the {fkind} with a lantern!",
            ],
            [
                "\"There you are!\" said {friend}. \"Everybody is looking for you.\" Together they walked home.",
                "{^parent} [gave {hero} a long hug|was so happy] and made {treat}. \"Next time I will stay on the path,\" said {hero}.",
            ],
        ],
        ["It is good to listen to those who love you.", "Stay calm when you are lost."],
    ),
    "sleep": (
        ["bedtime", "the night", "the moon", "a dream"],
        [
            [
                "It was [late|night], and {hero} could not sleep. {^he} [turned left and turned right|counted sheep|drank some water], but {his} eyes would not close.",
                "[Outside|Through the window], the moon was [round and bright|shining]. {hero} [tiptoed|went] outside.",
            ],
            [
                "There sat {friend} the {fkind}, looking at the stars. \"Can you not sleep either?\" asked {hero}.",
                "\"No,\" said {friend}. \"But [the stars are good company|the night is full of lovely sounds]. Listen!\"",
                "They heard [the wind in the trees|an owl far away|the song of the crickets]. They counted the stars: one, two, three, four, five...",
            ],
            [
                "Before they came to [twenty|ten|thirty], their eyes grew heavy. {hero} went back to bed [and|where {he}] dreamed of [a boat made of moonlight|flying over {place}|{a_thing} as big as a house].",
                "\"Good night,\" whispered the moon.",
            ],
        ],
        ["The night is quiet, and it keeps you safe.", "A calm heart finds sleep."],
    ),
    "rain": (
        ["a rainy day", "imagination", "being bored"],
        [
            [
                "It rained and rained. {hero} [looked out of the window|sat on the floor] and sighed. \"I am so bored,\" {he} said.",
                "\"Only boring people are bored,\" said {parent} with a [wink|smile]. \"[What can you make from a box|What can you do with {a_thing}]?\"",
            ],
            [
                "{hero} found [a big box|some chairs and a sheet]. \"It is a ship!\" {he} called. {friend} the {fkind} came in and asked, \"May I be the [captain|cook|sailor]?\"",
                "They sailed across the [living room|kitchen], [fought a storm|met a friendly whale|found an island made of pillows], and the {thing} was their treasure.",
                "\"Land ahead!\" shouted {friend}. The land was a table with {treat}.",
            ],
            [
                "When the sun came out again, they [did not even notice|were still playing].",
                "\"I hope it rains tomorrow too,\" said {hero}.",
            ],
        ],
        ["With imagination, every day can be an adventure.", "You do not need much to have fun."],
    ),
}

OPENINGS = [
    "[Once upon a time|Once|Long ago|Not so long ago], there was {a_trait_kind} named {hero} who lived in {home}.",
    "[Once upon a time|There once was a time when] {a_trait_kind} named {hero} lived {where}.",
    "{hero} was {a_trait_kind} who lived [in {home}|{where}].",
    "In {home} near {place} lived {a_trait_kind}. {^his} name was {hero}.",
    "Near {place}, in {home}, there lived {a_trait_kind} called {hero}.",
]
ENDINGS = [
    "{moral}", "And so {hero} learned: {moral_low}", "{hero} never forgot that day. {moral}",
    "From that day on, {hero} knew: {moral_low}", "The end.", "", "",
    "And if you visit {place}, you may still [meet|see] {hero} and {friend} there.",
]
