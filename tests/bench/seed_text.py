"""The words and the sentences from which seed_data.py makes its passages and questions."""

# The article's form of a prompt.
PROMPT = "Answer a question about this article:\n{context}\nQ:{question}A:"
# Words of a fixed list, by slot type.
WORDS = {kind: words.split(", ") for kind, words in {
    "building": "town hall, library, theatre, railway station, concert hall, hospital, post office, courthouse, school",
    "cargo": "coffee, sugar, timber, salt, wool, copper, rice, cotton, tobacco, tea, wine, coal, pepper, silk, leather, "
             "grain, rum, iron, marble, cocoa, olive oil, dried fish, cheese, lamp oil",
    "colour": "red, blue, green, yellow, white, black, orange, purple, brown, grey, pink, silver, golden, dark blue, "
              "pale green, bright red",
    "festival": "Lantern Festival, Harvest Festival, Kite Festival, Apple Festival, Snow Festival, River Festival, "
                "Candle Festival, Drum Festival, Rose Festival, Bread Festival, Mask Festival, Boat Festival, "
                "Moon Festival, Honey Festival, Puppet Festival, Fire Festival, Cherry Festival, Bell Festival",
    "food": "plums, walnuts, goat cheese, rye bread, smoked fish, honey, mushrooms, onions, pears, chestnuts, garlic, "
            "cherries, dried apples, pumpkins, butter, sausages, lentils, figs, ginger cake, carrots, potatoes, beans, "
            "strawberries, almond cakes, sour cream, spinach",
    "goods": "clocks, bicycles, umbrellas, pianos, lamps, gloves, stoves, bottles, shoes, cameras, radios, toys, tents, "
             "knives, pencils, carpets, saddles, mirrors, pumps, ropes, typewriters, scales, buttons, hats, sewing machines",
    "instrument": "violin, piano, flute, trumpet, guitar, cello, accordion, clarinet, harp, drums, banjo, organ, trombone, "
                  "saxophone, mandolin, double bass",
    "material": "bronze, silver, jade, ivory, clay, glass, oak, copper, gold, marble, iron, bone, walnut, pewter, amber, tin",
    "object": "crown, bowl, mask, sword, statue, bell, chessboard, lamp, shield, vase, goblet, ring, comb, flute, key, anchor",
    "prey": "beetles, berries, fish, frogs, roots, mice, snails, grass, mushrooms, acorns, worms, birds' eggs, pine cones, "
            "moss, crabs, tree bark, clover, wild onions",
    "profession": "teacher, painter, doctor, carpenter, lawyer, baker, sailor, farmer, tailor, printer, botanist, nurse, "
                  "gardener, journalist, blacksmith, banker, chemist, pilot, plumber, dentist, potter, butcher, miner, "
                  "translator, locksmith, surgeon, weaver, watchmaker, bus driver, ship's cook, piano tuner, shepherd",
    "sport": "tennis, football, hockey, chess, golf, cricket, rugby, volleyball, handball, badminton, table tennis, darts, "
             "water polo, baseball, basketball, billiards",
    "stuff": "brick, granite, sandstone, limestone, slate, copper, oak, tiles, zinc, concrete, marble, pine, glass, iron, "
             "steel, cedar, bronze, bamboo",
    "tree": "oak, beech, lime, maple, chestnut, willow, birch, cherry, pear, plum, apple, walnut, poplar, cedar, ash, elm",
}.items()}
FIRST = """Ada Agnes Albert Alma Anton Arthur Beatrice Bruno Carla Cecil Clara Conrad Daniel Dora Edgar Edith Elena Emil Erik
Esther Eva Felix Frida George Greta Gustav Hanna Harold Helen Hugo Ida Irene Isaac Ivan Jacob Julia Karl Laura Leo Lina
Louis Lucy Magda Marcus Maria Martin Mina Nora Oscar Otto Paula Peter Rosa Ruth Samuel Sofia Stella Theo Thomas Tilda
Ursula Victor Vera Walter Wilma""".split()
SYLLABLES = """bal bar ben bor bran cal car cor dal dan del dor fal fen fin gar gel gor hal har hel hol jar kal ken kor lam
lan lor mal mar mel mir mor nal nor pal pel por ran rel ros sal san sel sor tal tam ter tor val var ven vor wal wen win yel
zan zor""".split()
SURNAMES = "a ado am ane ard ek ell en er ert ic iel in ini is ley o ock oni ott ov sen son uk um wick".split()
TOWNS = "bach berg bridge bury by dale field ford ham haven low mere minster mouth port stad stead ton vale worth".split()
PEAKS = "a ak an ar en i il o on or u um".split()
FIRMS = ["Brothers", "Company", "Works", "and Sons", "Group", "Partners", "Industries", "Trading"]
TEAMS = ["Rovers", "United", "Tigers", "Eagles", "Wanderers", "Lions", "Hawks", "City"]
ADJECTIVES = ["Broken", "Burning", "Distant", "Empty", "Frozen", "Hidden", "Hollow", "Last", "Lost", "Lucky", "Quiet",
              "Restless", "Second", "Silent", "Stolen", "Tall", "Wandering", "Wild"]
NOUNS = ["Bridge", "Castle", "Garden", "Harbour", "Heron", "Island", "Letter", "Mountain", "Orchard", "Queen", "River",
         "Rose", "Star", "Storm", "Summer", "Swan", "Tower", "Winter"]
HABITATS = ["cliff", "desert", "forest", "hill", "island", "lake", "marsh", "meadow", "mountain", "northern", "river",
            "snow", "southern", "striped", "spotted", "long-tailed"]
ANIMALS = ["badger", "beaver", "deer", "fox", "goat", "hare", "lynx", "marten", "otter", "wild cat", "wolf", "antelope"]
MONTHS = ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
          "December"]
DAYS = ["Mondays", "Tuesdays", "Wednesdays", "Thursdays", "Fridays", "Saturdays", "Sundays"]
COUNTS = """three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
eighteen""".split()

# The passages. `!` begins the first sentence of a passage, `.` one of the others in any order, `$` a last one; `/` is
# another wording of the sentence above, `?` a question that this sentence answers with the named slot. (a|b) is a
# choice, {person1} a slot of type `person`, {last1} the last name of {person1}.
SCENES = """
= company
! {person1} (founded|started) {firm1} in {place1} in {year1} and made {goods1} in a (small|rented) workshop.
/ {firm1} was (founded|set up) in {year1} by {person1}, who made {goods1} in a (small|rented) workshop in {place1}.
? person1: Who (founded|started|set up|established) {firm1}?
? year1: (When|In what year|In which year) was {firm1} (founded|started|set up)?
? place1: (Where|In which town) (was {firm1} (founded|started)|did {firm1} begin)?
? goods1: What (did {firm1} make|were the products of {firm1}) (at first|in the beginning|in its first years)?
. In {year2}, {person2} (bought|took over) the company and moved it to {place2}.
/ {person2} (bought|took over) the company in {year2} and moved it to {place2}.
? person2: Who (bought|took over|acquired|became the new owner of) {firm1}?
? year2: (When|In what year) (was {firm1} bought|was {firm1} taken over|did {firm1} move|did {firm1} get a new owner)?
? place2: (Where|To which town) (was {firm1} moved|did {firm1} move|did the new owner move {firm1})?
. At its peak the company had {number2} workers, but today it has {number1} and sells {goods2}.
/ Today the company sells {goods2} and has {number1} workers, while at its peak it had {number2}.
? number1: How many (workers does {firm1} have|people work for {firm1}|people does {firm1} employ) (today|now)?
? number2: How many (workers did {firm1} have|people worked for {firm1}) (at its peak|in its best days)?
? goods2: What does {firm1} (sell|offer) (today|now|these days)?
$ Its (main|oldest) rival is {firm2}, a (family business|company) from {place3} that is (led|run) by {person3}.
? firm2: Which (company|firm) (is the rival of|competes with) {firm1}?
? person3: Who (runs|leads|is the head of|is in charge of) (the rival of {firm1}|{firm2})?
? place3: ((Where|In which town) is {firm2} based|(Where|From which town) does {firm2} come from)?

= life
! {person1}, who (became known|is remembered) as a {profession1}, was born in {place1} in {year1}.
/ Born in {place1} in {year1}, {person1} (became known|is remembered) as a {profession1}.
? place1: ((Where|In which town) was {person1} born|What (is|was) the birthplace of {person1})?
? year1: ((When|In what year|In which year) was {person1} born|What is the birth year of {person1})?
? profession1: (What is {person1} (known|remembered|best known) as|For what profession is {person1} known)?
. As a young adult, {last1} worked as a {profession2} in {place2} and (lived with|shared a house with) {person2}.
? profession2: What (job did {person1} have|profession did {person1} have|was {person1}'s job) (as a young adult|in early life)?
? place2: (Where|In which town) did {person1} (work|live) (as a young adult|in early life)?
? person2: (Who did {person1} live with|Who lived with {person1}|With whom did {person1} (live|share a house)) as a young adult?
. In {year2}, {last1} married {person3} in {place3}, and they had {few1} sons and {few2} daughters.
/ {last1} married {person3} in {place3} in {year2}, and they had {few2} daughters and {few1} sons.
? person3: Who (married|got married to|became the wife or husband of|was the wife or husband of) {person1}?
? year2: (When|In what year|In which year) (did {person1} marry|was the wedding of {person1}|did {last1} get married)?
? place3: (Where|In which town) (did {person1} marry|was the wedding of {person1}|did {last1} get married)?
? few1: How many sons (did {person1} have|were in the family|did the couple have|were born to {person1})?
? few2: How many daughters (did {person1} have|were in the family|did the couple have|were born to {person1})?
$ {last1} died in {place4} in {year3} and left {money1} to a school and {money2} to a hospital.
/ When {last1} died in {place4} in {year3}, a hospital received {money2} and a school {money1}.
? place4: (Where|In which town) (did {person1} die|did {last1} die|was {last1} at the time of death)?
? year3: (When|In what year|In which year) did ({person1}|{last1}) die?
? money1: How much (money did the school (get|receive)|did {person1} leave to the school|went to the school)?
? money2: How much (money did the hospital (get|receive)|did {person1} leave to the hospital|went to the hospital)?

= expedition
! In {year1}, {person1} led {small1} (climbers|explorers) from {place1} to {peak1}.
/ {person1} set out from {place1} in {year1} and led {small1} (climbers|explorers) to {peak1}.
? person1: Who led (the expedition|the journey|the group|the party) to {peak1}?
? year1: (When|In what year) did {person1} (set out for|leave for|travel to|go to) {peak1}?
? place1: (Where did (the expedition|the journey) to {peak1} (start|begin)|From which town did {person1} (set out|start))?
? peak1: (Which mountain|What mountain) (did {person1} go to|was the goal of {person1}|did {person1} want to climb)?
? small1: How many people (did {person1} lead|went with {person1}|followed {person1}|were led by {person1})?
. They went {distance2} by boat and then {distance1} on foot.
/ They (walked|marched) {distance1} after they had gone {distance2} by boat.
? distance2: How far did (they|the group|the expedition|{last1}'s group) (go|travel) by boat?
? distance1: How far did (they|the group|the expedition|{last1}'s group) (walk|travel on foot)?
. {person2} was the cook of the group, and {person3} drew the maps.
/ The maps were drawn by {person3}, and {person2} was the cook of the group.
? person2: Who (was the cook|cooked for the group|cooked the meals|did the cooking)?
? person3: Who (drew|made|was responsible for|produced) the maps?
. The way to the top took {duration1}, and the way home {duration2}.
/ They were on the top after {duration1}, and the way home took {duration2}.
? duration1: How long (did it take to (reach|get to) the top|did the climb take|was the way to the top)?
? duration2: How long (did the way home take|was the way home|did the journey home take|did it take to get home)?
$ A (second|later) expedition, led by {person4} in {year2}, went to {peak2} (with|and had) {small2} people.
? person4: Who led (the expedition|the journey|the group|the party) to {peak2}?
? year2: (When|In what year) (was the expedition|was the journey|did {person4} go|did {person4} lead a group) to {peak2}?
? small2: How many people (went with {person4}|did {person4} lead|were in the expedition to {peak2}|went to {peak2})?
? peak2: (Which mountain|What mountain) (did {person4} go to|was the goal of {person4}|did {person4} want to climb)?

= building
! The {building1} in {place1} was (designed|planned) by {person1} and opened in {year1}.
/ (Designed|Planned) by {person1}, the {building1} in {place1} opened in {year1}.
? person1: Who (designed|planned|drew the plans for|was the architect of) the {building1}?
? year1: (When|In what year|In which year) (did the {building1} open|was the {building1} opened)?
? place1: (Where|In which town) (is|can one find|can people see|stands) the {building1}?
. Its walls are made of {stuff1}, its roof of {stuff2} and its stairs of {stuff3}.
/ Its roof is made of {stuff2}, its stairs of {stuff3} and its walls of {stuff1}.
? stuff1: What (are the walls (of the {building1} |)made of|material are the walls|was used for the walls)?
? stuff2: What (is the roof (of the {building1} |)made of|material is the roof|was used for the roof)?
? stuff3: What (are the stairs (of the {building1} |)made of|material are the stairs|was used for the stairs)?
. The tower is {length1} (tall|high), and the main (room|hall) is {length2} long.
? length1: (How (tall|high) is the tower|What is the height of the tower)( of the {building1}|)?
? length2: (How long is the main (room|hall)|What is the length of the main (room|hall))( of the {building1}|)?
. It cost {money2} to build, and {money1} to repair after a (fire|storm|flood) in {year2}.
? money2: (How much did it cost to build|What was the price of|How much was paid for|What did it cost to build) the {building1}?
? money1: (How much did the repair cost|What was the (cost|price) of the repair|How much was paid for the repair)?
? year2: (When|In what year) (was the {building1} damaged|did the damage (happen|occur)|was the damage)?
$ The windows are by {person2} from {place2}, and the (painted ceiling|clock) is by {person3} from {place3}.
? person2: Who (made|created|was responsible for|produced) the windows( of the {building1}|)?
? place2: (Where|Which town|What town) does (the maker of the windows|{person2}) come from?
? place3: (Where does {person3} come from|(Which|What) town does {person3} come from|What is the home of {person3})?

= animal
! The {species1} lives near {place1} and was (first described|discovered) by {person1} in {year1}.
/ (First described|Discovered) by {person1} in {year1}, the {species1} lives near {place1}.
? person1: Who (first described|discovered|was the first to describe|identified) the {species1}?
? year1: (When|In what year) was the {species1} (first described|discovered)?
? place1: (Where|Near which town) (does the {species1} live|can one find the {species1})?
. It eats {prey1}, while a relative, the {species2}, lives near {place2} and eats {prey2}.
/ A relative, the {species2}, lives near {place2} and eats {prey2}, while the {species1} eats {prey1}.
? prey1: What (does the {species1} (eat|feed on|live on)|is the (food|diet) of the {species1})?
? prey2: What (does the {species2} (eat|feed on|live on)|is the (food|diet) of the {species2})?
? place2: (Where|Near which town) (does the {species2} live|can one find the {species2})?
? species2: Which animal (eats|feeds on|lives on|likes) {prey2}?
. The coat of the {species1} is {colour1} in summer and {colour2} in winter.
/ In winter the coat of the {species1} is {colour2}, and in summer it is {colour1}.
? colour1: What colour (is (the coat of |)the {species1}|does the {species1} have) (in summer|in the summer months)?
? colour2: What colour (is (the coat of |)the {species1}|does the {species1} have) (in winter|in the winter months)?
. Males of the {species1} weigh {weight2}, females {weight1}.
? weight2: (How much does a male (of the {species1} |)weigh|What is the weight of a male|How heavy are the males)?
? weight1: (How much does a female (of the {species1} |)weigh|What is the weight of a female|How heavy are the females)?
$ In {year2}, {person2} (counted|looked for) every {species1} and found {number2} in the wild and {number1} in zoos.
? person2: Who (counted the animals|looked for every {species1}|made the count|found {number2} animals)?
? year2: (When|In what year) (were the animals counted|did {person2} count the animals|was the count made)?
? number2: How many (were|animals were|of the animals were|were found) in the wild?
? number1: How many (were|animals were|of the animals were|were found) in zoos?

= festival
! The {festival1} in {place1} begins on {date1}, and the {festival2} in {place2} on {date2}.
/ In {place1} the {festival1} begins on {date1}, and in {place2} the {festival2} begins on {date2}.
? date1: (When|On what date|On which day) does the {festival1} (begin|start)?
? date2: (When|On what date|On which day) does the {festival2} (begin|start)?
? place1: (Where|In which town) (is the {festival1} (held|celebrated)|does the {festival1} take place)?
? place2: (Where|In which town) (is the {festival2} (held|celebrated)|does the {festival2} take place)?
? festival1: Which festival (is held|takes place|is celebrated|can be visited) in {place1}?
. People at the {festival2} eat {food2}, and those at the {festival1} eat {food1}.
/ At the {festival1} people eat {food1}, but at the {festival2} they eat {food2}.
? food1: What (do people eat|is eaten|do visitors eat|is the traditional food) at the {festival1}?
? food2: What (do people eat|is eaten|do visitors eat|is the traditional food) at the {festival2}?
. Last year {number1} people came to the {festival1} and {number2} to the {festival2}.
? number1: How many (people|visitors|guests) (came to|were at|attended) the {festival1}( last year|)?
? number2: How many (people|visitors|guests) (came to|were at|attended) the {festival2}( last year|)?
. The dancers of {place2} wear {colour2} (coats|hats|masks), those of {place1} {colour1} ones.
? colour1: (What colour do the dancers (of|in|from) {place1} wear|Which colour do {place1}'s dancers wear)?
? colour2: (What colour do the dancers (of|in|from) {place2} wear|Which colour do {place2}'s dancers wear)?
$ The {festival1} was (started|invented) by {person1}, a {profession1}, and the {festival2} by {person2}, a {profession2}.
? person1: Who (started|invented|had the idea for|began) the {festival1}?
? person2: Who (started|invented|had the idea for|began) the {festival2}?
? profession2: What (was the (job|profession|occupation) of {person2}|did {person2} do for a living)?

= match
! {team1} beat {team2} in the final in {place2} on {date2}.
/ In the final in {place2} on {date2}, {team1} (won against|defeated) {team2}.
? team1: (Which|What) team (won the final|was the winner|beat {team2}|defeated {team2})?
? team2: (Which|What) team (lost the final|lost to {team1}|was beaten|was defeated by {team1})?
? date2: (When|On what date|On which day) (was the final|did the final take place)( played|)?
? place2: (Where|In which town) (was the final (played|held)|did the final take place)?
. {person1} scored the first goal after {minutes1}, and {person2} the last after {minutes2}.
/ The first goal, by {person1}, came after {minutes1}, and the last, by {person2}, after {minutes2}.
? person1: Who (scored|got|netted|was the scorer of) the first goal?
? person2: Who (scored|got|netted|was the scorer of) the last goal?
? minutes1: (After how many minutes|After how long) (was|came) the first goal?
? minutes2: (After how many minutes|After how long) (was|came) the last goal?
. The winners wore {colour1} (shirts|socks), the losers {colour2} ones.
? colour1: What colour (did the winners wear|did the winning team wear|were the winners wearing|did {team1} wear)?
? colour2: What colour (did the losers wear|did the losing team wear|were the losers wearing|did {team2} wear)?
. Only {number1} people had seen the semi-final in {place1} on {date1}, but {number2} saw the final.
? number1: How many (people|fans|spectators) (saw|watched|were at|attended) the semi-final?
? number2: How many (people|fans|spectators) (saw|watched|were at|attended) the final?
? date1: (When|On what date|On which day) (was the semi-final|did the semi-final take place)?
? place1: (Where|In which town) (was the semi-final (played|held)|did the semi-final take place)?
$ The referee, {person3}, is a {profession3}, and the captain of the winners, {person4}, works as a {profession4}.
? person3: Who (was the referee|refereed the (match|final)|made the decisions as referee)?
? person4: Who (was the captain of|captained|led) (the winners|{team1})?
? profession3: What (is the (job|profession) of the referee|does the referee work as|does the referee do for a living)?
? profession4: What (is the (job|profession) of the captain|does the captain (work as|do for a living))?

= voyage
! The {ship1} left {place1} on {date1} with {cargo1} and (arrived in|reached) {place2} on {date2}.
/ On {date1}, the {ship1} left {place1} with {cargo1}, and (arrived in|reached) {place2} on {date2}.
? place1: (Where did the {ship1} sail from|From which (port|town) did the {ship1} (leave|sail|start))?
? place2: (Where did the {ship1} (arrive|go)|Which port did the {ship1} (reach|sail to))?
? date1: (When|On what date|On which day) did the {ship1} (leave|set sail|depart|start)?
? date2: (When|On what date|On which day) did the {ship1} (arrive|reach {place2}|get to {place2})?
? cargo1: What (was the cargo of the {ship1}|did the {ship1} carry) (on the way to|when it sailed to) {place2}?
. It (brought|carried) back {cargo2}, which was sold to {firm1}.
? cargo2: What (did the {ship1} (bring|carry) back|was the cargo (on the way back|of the voyage home))?
. The captain was {person1}, and the cook was {person2}.
/ The cook was {person2}, and the captain was {person1}.
? person1: Who (was the captain of|commanded|was in command of|captained) the {ship1}?
? person2: Who (was the cook|cooked the meals|cooked for the sailors|worked as the cook)( of the {ship1}|)?
. There were {small1} sailors and {small2} passengers on board.
/ It had {small2} passengers and {small1} sailors on board.
? small1: How many sailors (were on board|were on the {ship1}|did the {ship1} have|sailed to {place2})?
? small2: How many passengers (were on board|were on the {ship1}|did the {ship1} have|sailed to {place2})?
$ Another ship, the {ship2}, needed {duration2} for the same (route|voyage), and its owner was {firm2}.
? ship2: Which (ship|vessel) (belonged to|was owned by|was the property of) {firm2}?
? firm2: (Who|Which company|Which firm|What company) (owned|was the owner of) the {ship2}?

= book
! {title1} is a novel that {person1} wrote in {place1} in {year1}.
/ In {year1}, {person1} wrote the novel {title1} in {place1}.
? person1: (Who (wrote|is the author of|was the writer of)|By whom is) {title1}?
? place1: (Where|In which town) (did {person1} write {title1}|was {title1} written)?
? year1: (When|In what year) (did {person1} write {title1}|was {title1} written)?
. It tells (the story|) of a {profession1} who is (saved|rescued) by a {profession2}.
/ In the (story|novel), a {profession2} (saves|rescues) a {profession1}.
? profession1: (Who is (saved|rescued)|Who gets help|What is the job of the person who is (saved|rescued)) in {title1}?
? profession2: (Who (saves|rescues) somebody|Who (helps|saves the life of) another person) in {title1}?
. {firm1} (published|printed) it and paid {money1}, and {firm2} bought the film rights for {money2}.
/ The film rights were bought by {firm2} for {money2}, while {firm1}, which published it, had paid {money1}.
? firm1: (Which|What) (company|firm) (published|brought out) (the novel|{title1})?
? firm2: (Which|What) (company|firm) (bought|paid for) the film rights( of {title1}|)?
? money1: How much did (the publisher|{firm1}) pay( for {title1}| for the novel|)?
? money2: How much (did (the film rights|{firm2}) (cost|pay)|was paid for the film rights)?
. The book sold {number1} copies in the first year and {number2} in the second.
? number1: How many copies (were sold|of {title1} were sold|were bought|did the novel sell) in the first year?
? number2: How many copies (were sold|of {title1} were sold|were bought|did the novel sell) in the second year?
$ {last1}'s next novel, {title2}, was written in {place2} and filmed by {person2} in {year2}.
/ {person2} filmed {last1}'s next novel, {title2}, which was written in {place2}, in {year2}.
? title2: (Which|What) (novel|book) (did {person1} write after|followed|came after) {title1}?
? person2: (Who (filmed|made the film of|turned into a film)|By whom is the film of) {title2}?
? place2: (Where|In which town) (did {person1} write {title2}|was {title2} written)?
? year2: (When|In what year) (was {title2} filmed|did {person2} film {title2})?

= museum
! The museum in {place1} (shows|owns) a {material1} {object1} and a {material2} {object2}.
/ A {material1} {object1} and a {material2} {object2} can be seen in the museum in {place1}.
? material1: (What is the {object1} made of|(What|Which) material is the {object1}|What was used to make the {object1})?
? material2: (What is the {object2} made of|(What|Which) material is the {object2}|What was used to make the {object2})?
? object1: (What|Which object|Which thing|Which item) is made of {material1}?
. {person2} found the {object2} in {year2}, and {person1} found the {object1} in {year1}.
/ The {object1} was found by {person1} in {year1}, the {object2} by {person2} in {year2}.
? person1: Who (found|discovered|was the finder of|came across) the {object1}?
? person2: Who (found|discovered|was the finder of|came across) the {object2}?
? year1: (When|In what year) was the {object1} (found|discovered)?
? year2: (When|In what year) was the {object2} (found|discovered)?
. The {object2} weighs {weight2} and the {object1} {weight1}.
? weight1: (How much does the {object1} weigh|How heavy is the {object1}|What (is the weight of|weight has) the {object1})?
? weight2: (How much does the {object2} weigh|How heavy is the {object2}|What (is the weight of|weight has) the {object2})?
. The {object1} was bought for {money1}, the {object2} for {money2}.
? money1: (How much did the {object1} cost|(How much was paid for|What was the price of|What did they pay for) the {object1})?
? money2: (How much did the {object2} cost|(How much was paid for|What was the price of|What did they pay for) the {object2})?
$ The {object1} comes from {place2} and the {object2} from {place3}.
/ While the {object2} comes from {place3}, the {object1} comes from {place2}.
? place2: ((Where|Which town) does the {object1} come from|(Where|Which town) is the {object1} from)?
? place3: ((Where|Which town) does the {object2} come from|(Where|Which town) is the {object2} from)?

= railway
! The railway from {place1} to {place2} was built by {firm1} and opened in {year1}.
/ In {year1}, {firm1} opened a railway from {place1} to {place2}.
? firm1: (Which|What) (company|firm) (built|opened) the railway?
? year1: (When|In what year|In which year) (was the railway opened|did the railway open)?
? place1: (Where does the railway (start|begin)|(In|From) which town does the railway start)?
? place2: (Where does the railway (end|lead to)|(In|At) which town does the railway end)?
. It is {distance1} long, while the road (beside it|over the hills) is {distance2} long.
/ The road is {distance2} long, but the railway is only {distance1} long.
? distance1: (How long is the (railway|line)|What is the length of the (railway|line)|How far is it by rail)?
? distance2: (How long is the road|What is the length of the road|How far is it by road|What is the distance by road)?
. The trip takes {minutes1} by train and {minutes2} by bus.
/ By bus the trip takes {minutes2}, and by train {minutes1}.
? minutes1: How long (does the trip take|is the trip|does it take|do people travel) by train?
? minutes2: How long (does the trip take|is the trip|does it take|do people travel) by bus?
. The route was planned by {person1}, and the bridges by {person2}.
? person1: Who (planned|chose|was responsible for|drew the plans for) the route?
? person2: Who (planned|designed|was responsible for|drew the plans for) the bridges?
. There are {small1} stations and {small2} tunnels on the way.
? small1: How many stations (are there|does the railway have|are on the way|does the train pass)?
? small2: How many tunnels (are there|does the railway have|are on the way|does the train go through)?
$ In {year2}, {firm2} bought the railway, and the trains, once {colour1}, became {colour2}.
/ {firm2} bought the railway in {year2}, and the {colour1} trains were painted {colour2}.
? firm2: (Which|What) (company|firm) (bought|took over) the railway?
? year2: (When|In what year) (was the railway (bought|sold)|did the railway get a new owner)?
? colour1: What colour (did the trains have|were the trains) (at first|before the railway was sold)?
? colour2: What colour (did the trains get|are the trains) (in the end|after the railway was sold)?

= friends
! {person1} and {person2} grew up (together|on the same street|in the same house) in {place1}.
. {last1} (works|now works) as a {profession1} in {place2}, and {last2} as a {profession2} in {place3}.
/ {last2} (works|now works) as a {profession2} in {place3}, {last1} as a {profession1} in {place2}.
? profession1: What (is {person1}'s (job|profession)|does {person1} (work as|do for a living))?
? profession2: What (is {person2}'s (job|profession)|does {person2} (work as|do for a living))?
? place2: (Where|In which town) (does {person1} work|has {person1} found work)( now|)?
? place3: (Where|In which town) (does {person2} work|has {person2} found work)( now|)?
. {last2} plays {sport2} and likes {food2}, but {last1} plays {sport1} and likes {food1}.
/ {last1} likes {food1} and plays {sport1}, while {last2} likes {food2} and plays {sport2}.
? sport1: (What|Which) (sport|game) does {person1} play?
? sport2: (What|Which) (sport|game) does {person2} play?
? food1: What (does {person1} (like|enjoy)( to eat|)|is the favourite food of {person1})?
? food2: What (does {person2} (like|enjoy)( to eat|)|is the favourite food of {person2})?
. {last1} lives in a {colour1} house and has {few1} children, {last2} lives in a {colour2} one and has {few2}.
? few1: How many children (does {person1} have|are in {person1}'s family|live with {person1}|does {last1} have)?
? few2: How many children (does {person2} have|are in {person2}'s family|live with {person2}|does {last2} have)?
? colour1: (What colour is|What is the colour of) ({person1}'s house|the house of {person1})?
? colour2: (What colour is|What is the colour of) ({person2}'s house|the house of {person2})?
$ They both (admire|visit) {person3}, who taught them the {instrument1}, and {person4}, who taught them the {instrument2}.
? person3: (Who taught|From whom did they learn|Who was the teacher for|Who showed them) the {instrument1}?
? person4: (Who taught|From whom did they learn|Who was the teacher for|Who showed them) the {instrument2}?
? instrument2: (What|Which instrument|What instrument) (did {person4} teach|did they learn from {person4})?

= market
! At the market in {place1}, {person1} sells {food1} on {day1}, and {person2} sells {food2} on {day2}.
/ {person2} sells {food2} on {day2} at the market in {place1}, and {person1} sells {food1} there on {day1}.
? person1: (Who sells|Who has|From whom can people buy|Who offers) {food1}?
? person2: (Who sells|Who has|From whom can people buy|Who offers) {food2}?
? food1: What (does {person1} sell|can people buy from {person1}|does {person1} offer|are the goods of {person1})?
? food2: What (does {person2} sell|can people buy from {person2}|does {person2} offer|are the goods of {person2})?
? day1: (When|On which days) (does {person1} sell {food1}|is {person1} at the market)?
? day2: (When|On which days) (does {person2} sell {food2}|is {person2} at the market)?
. {last2}'s goods cost {price1} a (box|bag), {last1}'s {price2}.
? price2: How much (do {person1}'s goods cost|do people pay for {food1}|are {person1}'s goods|do people pay {person1})?
? price1: How much (do {person2}'s goods cost|do people pay for {food2}|are {person2}'s goods|do people pay {person2})?
. {last1} comes from {place2}, {distance1} away, but {last2} comes from {place3}, {distance2} away.
? place2: (Where does {person1} come from|From (where|which town|what town) does {person1} come)?
? place3: (Where does {person2} come from|From (where|which town|what town) does {person2} come)?
? distance1: How far (is {place2} from the market|away is {place2}|does {person1} have to travel|away does {person1} live)?
? distance2: How far (is {place3} from the market|away is {place3}|does {person2} have to travel|away does {person2} live)?
$ {last1}'s stall is {colour1}, and {last2}'s is {colour2}.
? colour1: (What colour is|What is the colour of) ({person1}'s|{last1}'s) stall?
? colour2: (What colour is|What is the colour of) ({person2}'s|{last2}'s) stall?

= race
! {person1} won the race in {place1} in {minutes1}, ahead of {person2}, who needed {minutes2}.
/ {person2} came second in the race in {place1} in {minutes2}, behind {person1}, who won it in {minutes1}.
? person1: Who (won|was the winner of|came first in|was the fastest in) the race?
? person2: Who (came second in|was second in|came in after the winner of|was the runner-up in) the race?
? minutes1: (How long did (the winner|{person1}) need|What was the time of (the winner|{person1}))?
? minutes2: (How long did (the runner-up|{person2}) need|What was the time of (the runner-up|{person2}))?
. The winner received {money2}, the second {money1}.
/ The second received {money1} and the winner {money2}.
? money2: How much (did the winner (get|receive)|was the first prize|money went to {person1})?
? money1: How much (did the second (get|receive)|was the second prize|money went to {person2})?
. {last1} is a {profession1} from {place2}, {last2} is a {profession2} from {place3}.
/ {last2}, a {profession2}, comes from {place3}, and {last1}, a {profession1}, from {place2}.
? profession1: What (is the (job|profession) of|kind of work is done by) (the winner|{person1})?
? place2: (Where (does (the winner|{person1}) come from|is {person1} from)|Which town is (the winner|{person1}) from)?
? place3: (Where (does (the runner-up|{person2}) come from|is {person2} from)|Which town is (the runner-up|{person2}) from)?
. There were {number2} runners at the start, but only {number1} at the finish.
? number2: How many (runners|people) (started|were at the start|began the race)?
? number1: How many (runners|people) (finished|were at the finish|got to the end)?
$ The course had {small1} hills and {small2} bridges.
/ On the way there were {small2} bridges and {small1} hills.
? small1: How many hills (were there|were on the way|did the course have|did the runners climb)?
? small2: How many bridges (were there|were on the way|did the course have|did the runners cross)?

= garden
! The garden of {person1} in {place1} has {small1} {tree1} trees and {small2} {tree2} trees.
/ In {place1}, {person1} has a garden with {small2} {tree2} trees and {small1} {tree1} trees.
? small1: How many {tree1} trees (are there|are in the garden|does {person1} have|grow there)?
? small2: How many {tree2} trees (are there|are in the garden|does {person1} have|grow there)?
. The {tree1} trees were planted by {person2} in {year1}, the {tree2} trees by {person3} in {year2}.
/ In {year2}, {person3} planted the {tree2} trees, but the {tree1} trees had been planted by {person2} in {year1}.
? person2: Who (planted|put in) the {tree1} trees( in the garden|)?
? person3: Who (planted|put in) the {tree2} trees( in the garden|)?
? year1: (When|In what year) (were the {tree1} trees planted|did {person2} plant trees)?
? year2: (When|In what year) (were the {tree2} trees planted|did {person3} plant trees)?
? tree2: (Which trees|What kind of trees|What trees|What) did {person3} plant?
. The bench is made of {stuff1} and the (gate|wall) of {stuff2}.
? stuff1: (What is the bench made of|(What|Which) material is the bench|What was used for the bench)?
. The path is {length1} long, and the old wall is {length2} long.
? length1: (How long is|What is the length of|What length has|How far can one walk on) the path?
? length2: (How long is the (old |)wall|What is the length of the (old |)wall)?
. A {profession1} cuts the trees every year for {price2}, and a {profession2} (cleans|looks after) the pond for {price1}.
? profession1: Who (cuts the trees|takes care of the trees|cuts the trees every year|is paid for the trees)?
? profession2: Who (takes care of the pond|is paid for the pond|looks after the pond|is responsible for the pond)?
? price2: How much (is paid for cutting|does it cost to cut|is spent on cutting|does the {profession1} get for) the trees?
? price1: How much (is paid for|does it cost to look after|is spent on|does the {profession2} get for) the pond?
"""
