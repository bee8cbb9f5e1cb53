"""What the question and answer documents know, as plain tables."""

CAPITALS = dict(
    pair.split("=") for pair in (
        "France=Paris;Spain=Madrid;Italy=Rome;Germany=Berlin;Portugal=Lisbon;Austria=Vienna;Greece=Athens;"
        "Poland=Warsaw;Hungary=Budapest;Norway=Oslo;Sweden=Stockholm;Finland=Helsinki;Denmark=Copenhagen;"
        "Ireland=Dublin;Belgium=Brussels;the Netherlands=Amsterdam;Switzerland=Bern;Iceland=Reykjavik;"
        "the United Kingdom=London;Ukraine=Kyiv;Romania=Bucharest;Bulgaria=Sofia;Croatia=Zagreb;Serbia=Belgrade;"
        "Turkey=Ankara;Egypt=Cairo;Kenya=Nairobi;Ethiopia=Addis Ababa;Nigeria=Abuja;Ghana=Accra;Morocco=Rabat;"
        "Senegal=Dakar;Tanzania=Dodoma;Uganda=Kampala;Rwanda=Kigali;Japan=Tokyo;China=Beijing;India=New Delhi;"
        "Nepal=Kathmandu;Thailand=Bangkok;Vietnam=Hanoi;Indonesia=Jakarta;South Korea=Seoul;Mongolia=Ulaanbaatar;"
        "Iran=Tehran;Iraq=Baghdad;Jordan=Amman;Australia=Canberra;New Zealand=Wellington;Canada=Ottawa;"
        "the United States=Washington, D.C.;Mexico=Mexico City;Cuba=Havana;Brazil=Brasilia;Argentina=Buenos Aires;"
        "Chile=Santiago;Peru=Lima;Colombia=Bogota;Uruguay=Montevideo;Ecuador=Quito"
    ).split(";")
)
CONTINENTS = {
    "Europe": "France Spain Italy Germany Portugal Austria Greece Poland Norway Sweden Finland Denmark Ireland".split(),
    "Africa": "Egypt Kenya Ethiopia Nigeria Ghana Morocco Senegal Tanzania Uganda Rwanda".split(),
    "Asia": ["Japan", "China", "India", "Nepal", "Thailand", "Vietnam", "Mongolia", "South Korea", "Jordan"],
    "South America": "Brazil Argentina Chile Peru Colombia Uruguay Ecuador".split(),
    "North America": ["Canada", "Mexico", "the United States", "Cuba"],
}
# animal -> (sound, young, legs, home, food, group)
ANIMALS = {
    name: tuple(rest.split(",")) for name, rest in (
        line.split(":") for line in (
            "dog:woof,puppy,4,in a house or a kennel,meat and dog food,mammal;"
            "cat:meow,kitten,4,in a house,fish and mice,mammal;cow:moo,calf,4,on a farm,grass and hay,mammal;"
            "horse:neigh,foal,4,in a stable,grass and oats,mammal;pig:oink,piglet,4,on a farm,roots and grain,mammal;"
            "sheep:baa,lamb,4,on a farm,grass,mammal;goat:baa,kid,4,on a farm,grass and leaves,mammal;"
            "duck:quack,duckling,2,near water,seeds and water plants,bird;chicken:cluck,chick,2,on a farm,grain,bird;"
            "owl:hoot,owlet,2,in hollow trees,mice,bird;lion:roar,cub,4,on the savanna,meat,mammal;"
            "bear:growl,cub,4,in the forest,berries and fish,mammal;wolf:howl,pup,4,in the forest,meat,mammal;"
            "frog:croak,tadpole,4,near ponds,insects,amphibian;bee:buzz,larva,6,in a hive,nectar and pollen,insect;"
            "snake:hiss,snakelet,0,in forests and deserts,small animals,reptile;mouse:squeak,pup,4,in small holes,seeds and grain,mammal;"
            "elephant:trumpet,calf,4,on the savanna,leaves and grass,mammal;donkey:hee-haw,foal,4,on a farm,grass and hay,mammal;"
            "fox:bark,cub,4,in a den,mice and berries,mammal"
        ).split(";")
    )
}
# animal -> (can fly, can swim, legs)
ABILITIES = {
    "eagle": (1, 0, 2), "sparrow": (1, 0, 2), "bat": (1, 0, 2), "butterfly": (1, 0, 6), "bee": (1, 0, 6),
    "penguin": (0, 1, 2), "fish": (0, 1, 0), "whale": (0, 1, 0), "shark": (0, 1, 0), "dolphin": (0, 1, 0),
    "duck": (1, 1, 2), "swan": (1, 1, 2), "snail": (0, 0, 0), "spider": (0, 0, 8), "ant": (0, 0, 6),
    "octopus": (0, 1, 8), "ostrich": (0, 0, 2), "frog": (0, 1, 4), "otter": (0, 1, 4),
}
SIZES = ["an ant", "a bee", "a mouse", "a rabbit", "a cat", "a dog", "a sheep", "a horse", "an elephant", "a whale"]
SPEEDS = ["a snail", "a turtle", "a duck", "a person", "a horse", "a car", "a train", "a plane", "a rocket"]
COLOURS_OF = {
    "the sky on a clear day": "blue", "grass": "green", "snow": "white", "a ripe banana": "yellow", "a carrot": "orange",
    "a ripe tomato": "red", "a strawberry": "red", "coal": "black", "milk": "white", "chocolate": "brown",
    "the sun in a drawing": "yellow", "a flamingo": "pink", "an elephant": "grey", "a leaf in summer": "green",
    "a lemon": "yellow", "a polar bear": "white", "a plum": "purple", "a frog": "green", "the night sky": "black",
    "a fire engine": "red", "a pumpkin": "orange", "an aubergine": "purple", "a crow": "black", "the sea": "blue",
}
MIXES = {
    ("red", "yellow"): "orange", ("blue", "yellow"): "green", ("red", "blue"): "purple",
    ("red", "white"): "pink", ("black", "white"): "grey",
}
OPPOSITES = dict(
    pair.split("=") for pair in (
        "hot=cold;big=small;fast=slow;tall=short;happy=sad;day=night;up=down;left=right;open=closed;full=empty;"
        "old=young;new=old;hard=soft;light=dark;heavy=light;early=late;loud=quiet;clean=dirty;wet=dry;rich=poor;"
        "strong=weak;high=low;near=far;first=last;black=white;good=bad;easy=difficult;thick=thin;wide=narrow;"
        "deep=shallow;sweet=sour;brave=afraid;true=false;inside=outside;always=never;begin=end;win=lose;push=pull;"
        "give=take;come=go;buy=sell;love=hate;laugh=cry;before=after;above=below;front=back;north=south;east=west;"
        "summer=winter;friend=enemy;question=answer;rough=smooth;sharp=blunt;awake=asleep;alive=dead;long=short"
    ).split(";")
)
SYNONYMS = dict(
    pair.split("=") for pair in (
        "big=large;small=little;happy=glad;fast=quick;smart=clever;begin=start;end=finish;scared=afraid;quiet=silent;"
        "pretty=beautiful;angry=mad;sad=unhappy;easy=simple;sick=ill;rich=wealthy;gift=present;stone=rock;tired=sleepy;"
        "brave=courageous;nice=kind;shout=yell;jump=leap;cold=chilly;odd=strange"
    ).split(";")
)
PLURALS = dict(
    pair.split("=") for pair in (
        "child=children;mouse=mice;foot=feet;tooth=teeth;goose=geese;man=men;woman=women;person=people;leaf=leaves;"
        "wolf=wolves;knife=knives;sheep=sheep;fish=fish;baby=babies;city=cities;box=boxes;bus=buses;dog=dogs;cat=cats;"
        "tree=trees;book=books;star=stars;story=stories;potato=potatoes;house=houses;deer=deer"
    ).split(";")
)
PASTS = dict(
    pair.split("=") for pair in (
        "go=went;eat=ate;see=saw;run=ran;sing=sang;write=wrote;swim=swam;take=took;give=gave;come=came;find=found;"
        "think=thought;buy=bought;make=made;say=said;fly=flew;drink=drank;sleep=slept;walk=walked;play=played;jump=jumped;"
        "know=knew;begin=began;fall=fell;read=read;build=built"
    ).split(";")
)
SHAPES = {"triangle": 3, "square": 4, "rectangle": 4, "pentagon": 5, "hexagon": 6, "octagon": 8}
UNITS = [
    ("seconds", "a minute", 60), ("minutes", "an hour", 60), ("hours", "a day", 24), ("days", "a week", 7),
    ("months", "a year", 12), ("days", "a year", 365), ("years", "a century", 100), ("centimetres", "a metre", 100),
    ("metres", "a kilometre", 1000), ("grams", "a kilogram", 1000), ("weeks", "a year", 52), ("cents", "a euro", 100),
    ("letters", "the English alphabet", 26), ("fingers", "one hand", 5), ("wheels", "a bicycle", 2),
    ("wheels", "a car", 4), ("seasons", "a year", 4), ("players", "a football team", 11), ("planets", "our solar system", 8),
    ("colours", "the rainbow", 7), ("eggs", "a dozen", 12), ("strings", "a violin", 4),
]
# Each: (ways to ask, answers); every answer goes with every way to ask.
PLAIN = [
    ("[Which|What] animal is the [largest|biggest] in the world?", "The blue whale is the largest animal in the world."),
    ("[Which|What] is the tallest animal?", "The giraffe is the tallest animal."),
    ("[Which|What] is the fastest land animal?", "The cheetah is the fastest land animal."),
    ("[Which|What] animal is called the king of the animals?", "The lion is called the king of the animals."),
    ("[Which|What] animal gives us milk?", "The cow gives us milk."),
    ("[Which|What] animal makes honey?", "Bees make honey."),
    ("[Which|What] planet do we live on?", "We live on the planet Earth."),
    ("[Which|What] is the [largest|biggest] planet[| in our solar system]?", "Jupiter is the largest planet in our solar system."),
    ("[Which|What] is the smallest planet?", "Mercury is the smallest planet in our solar system."),
    ("[Which|What] planet is closest to the sun?", "Mercury is the planet closest to the sun."),
    ("[Which|What] planet is [known as|called] the red planet?", "Mars is known as the red planet."),
    ("[Which|What] planet has [big|large|beautiful] rings?", "Saturn is famous for its rings."),
    ("What [is|do you call] frozen water?", "Frozen water is called ice."),
    ("What do bees make?", "Bees make honey."), ("What do cows drink?", "Cows drink water."),
    ("What is the capital city of England?", "The capital of England is London."),
    ("[Which|What] is the longest river in [the world|Africa]?", "The Nile is the longest river in Africa and often named as the longest in the world."),
    ("[Which|What] is the highest mountain[| in the world| on Earth]?", "Mount Everest is the highest mountain in the world."),
    ("[Which|What] is the largest ocean?", "The Pacific Ocean is the largest ocean."),
    ("[Which|What] is the largest desert that is hot?", "The Sahara is the largest hot desert."),
    ("What do plants need to grow?", "Plants need water, light, air and good soil to grow."),
    ("What do we use to [write|draw]?", "We use a pencil or a pen."),
    ("What do you use to cut paper?", "You use scissors to cut paper."),
    ("What do you use to open a [locked door|lock]?", "You use a key."),
    ("What do you wear on your feet?", "You wear shoes on your feet."),
    ("What do you wear on your head?", "You wear a hat on your head."),
    ("What do you need when it rains?", "You need an umbrella when it rains."),
    ("What do we [smell|breathe] with?", "We use our nose."), ("What do we see with?", "We see with our eyes."),
    ("What do we hear with?", "We hear with our ears."), ("Who puts out fires?", "Firefighters put out fires."),
    ("Who [bakes|makes] bread?", "A baker makes bread."), ("Who [helps|treats] sick people?", "Doctors and nurses help sick people."),
    ("Who teaches children[| at school]?", "A teacher teaches children."), ("Who flies a plane?", "A pilot flies a plane."),
    ("Who grows [food|vegetables] on a farm?", "A farmer grows food on a farm."),
    ("Who wrote Romeo and Juliet?", "William Shakespeare wrote Romeo and Juliet."),
    ("Who painted the Mona Lisa?", "Leonardo da Vinci painted the Mona Lisa."),
    ("Who was the first person on the moon?", "Neil Armstrong was the first person on the moon."),
    ("When do [leaves fall|the leaves fall]?", "Leaves fall in autumn."), ("When do flowers bloom?", "Most flowers bloom in spring and summer."),
    ("Where does the sun rise?", "The sun rises in the east."), ("Where does the sun set?", "The sun sets in the west."),
    ("At [what|which] temperature does water boil?", "Water boils at 100 degrees Celsius."),
    ("At [what|which] temperature does water freeze?", "Water freezes at 0 degrees Celsius."),
    ("What is H2O?", "H2O is water."), ("What gas do we [breathe in|need to breathe]?", "We need oxygen to breathe."),
    ("Is the [sun|Sun] a star or a planet?", "The sun is a star."), ("Is a tomato a fruit?", "Yes, for a botanist a tomato is a fruit."),
    ("Is a whale a fish?", "No, a whale is a mammal."), ("Is a spider an insect?", "No, a spider is not an insect. It has eight legs."),
    ("Is ice hot or cold?", "Ice is cold."), ("Is fire hot or cold?", "Fire is hot."), ("Is sugar sweet or sour?", "Sugar is sweet."),
    ("Is a lemon sweet or sour?", "A lemon is sour."), ("Is a stone hard or soft?", "A stone is hard."),
]
EXPLANATIONS = [
    ("[Why is the sky blue|Why does the sky look blue]?", "Sunlight is made of many colours. The air scatters blue light more than the other colours, so the sky looks blue."),
    ("[Why does it rain|Where does rain come from|What is rain]?", "Water from seas and rivers rises into the air and becomes clouds. When the drops in a cloud grow heavy, they fall down as rain."),
    ("[Why do leaves change colour|Why do leaves turn yellow in autumn]?", "In autumn, trees stop making the green colour in their leaves. Then the yellow and red colours can be seen."),
    ("[Why do we sleep|Why is sleep important]?", "Sleep lets the body rest and repair itself, and it helps the brain remember what we learned during the day."),
    ("[What is a rainbow|How is a rainbow made|How does a rainbow form]?", "A rainbow appears when the sun shines through raindrops. The drops split the light into its colours, from red to violet."),
    ("[Why is there day and night|What makes day and night]?", "The Earth turns once a day. The side that faces the sun has day, and the other side has night."),
    ("[Why do we have seasons|What makes the seasons]?", "The Earth is tilted. While it travels around the sun, first one half and then the other gets more sunlight, and that makes the seasons."),
    ("[How do birds fly|Why can birds fly]?", "Birds have light bones, strong muscles and wings. When they beat their wings, the air pushes them up."),
    ("[How do plants eat|What is photosynthesis]?", "Plants make their own food from sunlight, water and air. This is called photosynthesis, and it happens in the green leaves."),
    ("[What is gravity|Why do things fall down]?", "Gravity is the force that pulls things towards each other. The Earth is so big that it pulls everything down to the ground."),
    ("[What is a volcano|How does a volcano work]?", "A volcano is a mountain with an opening. Hot melted rock from deep in the Earth can come out of it as lava."),
    ("[Why is the sea salty|Why does the sea taste of salt]?", "Rivers carry tiny amounts of salt from the rocks into the sea. The water leaves as vapour, but the salt stays."),
    ("[What is the moon|Why does the moon shine]?", "The moon is a ball of rock that travels around the Earth. It does not make light: it shines because the sun shines on it."),
    ("[What are clouds made of|What is a cloud]?", "Clouds are made of tiny drops of water or small crystals of ice that float in the air."),
    ("[How do fish breathe|How can fish live under water]?", "Fish breathe with gills. The gills take oxygen out of the water."),
    ("[Why do cats purr|Why does a cat purr]?", "Cats often purr when they feel safe and happy. Sometimes they also purr to calm themselves."),
    ("[What is bread made of|How do you make bread]?", "Bread is made of flour, water, salt and yeast. You mix them, let the dough rise and bake it in a hot oven."),
    ("[How do you make tea|How can I make a cup of tea]?", "Boil some water, pour it over the tea in a cup, wait three minutes and take the tea out. Then it is ready."),
    ("[Why should I brush my teeth|Why do we brush our teeth]?", "Brushing removes food and germs from your teeth. It keeps them clean and healthy."),
    ("[What is a computer|What does a computer do]?", "A computer is a machine that follows instructions. It can store, change and show information very fast."),
    ("[What is an algorithm]?", "An algorithm is a list of clear steps that solves a problem, much like a recipe."),
    ("[What is a friend|What makes a good friend]?", "A friend is somebody you like and trust. A good friend listens, helps and laughs with you."),
    ("[What is a library]?", "A library is a place with many books that people can read there or borrow."),
    ("[What is thunder|Why does it thunder]?", "Lightning heats the air so fast that the air bursts outwards. The sound of it is thunder."),
    ("[What is snow|How is snow made]?", "Snow is made of small ice crystals that form in cold clouds and fall to the ground."),
    ("[How do I ride a bicycle|How can I learn to ride a bicycle]?", "Start slowly on a flat path, look ahead, keep pedalling and hold the handlebar lightly. With some practice, you will keep your balance."),
    ("[What is Rust|What is the Rust language]?", "Rust is a programming language. It is fast, and its compiler finds many mistakes with memory before the program runs."),
    ("[What is Python|What is the Python language]?", "Python is a programming language that is easy to read. Many people use it for data, science and teaching."),
    ("[What is a map]?", "A map is a drawing of a place seen from above. It helps you to find your way."),
    ("[What is music]?", "Music is sound that is put in order with rhythm and melody, so that people enjoy it."),
]
TRANSLATIONS = {
    "French": {"hello": "bonjour", "thank you": "merci", "yes": "oui", "no": "non", "boy": "garçon", "summer": "été",
               "school": "école", "heart": "cœur", "cat": "chat", "dog": "chien", "house": "maison", "water": "eau", "goodbye": "au revoir"},
    "German": {"hello": "hallo", "thank you": "danke", "yes": "ja", "no": "nein", "beautiful": "schön", "street": "Straße",
               "girl": "Mädchen", "green": "grün", "cat": "Katze", "dog": "Hund", "house": "Haus", "water": "Wasser", "goodbye": "auf Wiedersehen"},
    "Spanish": {"hello": "hola", "thank you": "gracias", "yes": "sí", "no": "no", "boy": "niño", "tomorrow": "mañana",
                "tree": "árbol", "bread": "pan", "cat": "gato", "dog": "perro", "house": "casa", "water": "agua", "goodbye": "adiós"},
    "Italian": {"hello": "ciao", "thank you": "grazie", "yes": "sì", "no": "no", "city": "città", "coffee": "caffè",
                "cat": "gatto", "dog": "cane", "house": "casa", "water": "acqua", "goodbye": "arrivederci"},
}
EMOJI = {
    "cat": "🐱", "dog": "🐶", "sun": "☀️", "star": "⭐", "heart": "❤️", "fire": "🔥", "tree": "🌳", "rainbow": "🌈",
    "rocket": "🚀", "book": "📚", "pizza": "🍕", "apple": "🍎", "fox": "🦊", "moon": "🌙", "cake": "🎂", "flower": "🌸",
}
