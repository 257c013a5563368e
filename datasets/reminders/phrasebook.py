"""The words of the reminders task: names, places, titles, and the sentence patterns of each intent.

In a pattern "(a|b)" picks one, "[x]" keeps x with probability 0.4, and {slot} is filled by make.py.
"""

# --- what people say: names, places, things ------------------------------------------------------------------

NAMES = """Ana Tom Priya Zoë José Søren Łukasz Mei Omar Fatima Yusuf Ingrid Björn Chloé André Siobhán Kwame Aisha
Ravi Nadia Elena Marco Luca Giulia Hiro Yuki Sana Leila Dmitri Olga Pavel Katya Anders Freya Lars Astrid Mateo
Lucía Sofía Diego Carmen Rafael João Beatriz Thiago Amara Chidi Ngozi Kofi Zainab Hassan Layla Karim Noor Tariq
Wei Jun Linh Minh Thu Arjun Divya Kiran Anjali Rohan Hannah Ben Emma Oliver Grace Harry Lucy Sam Ellie Jack
Molly George Isla Callum Fiona Angus Rhys Megan Owen Niamh Ciarán Declan Aoife Claire Hugo Margaux Théo Inès
Felix Greta Jonas Heidi Klaus Zuzana Jakub Marta Petra Milan Eszter Gábor Mum Dad Grandma""".split()
FAMILY = {"Mum": "mum", "Dad": "dad", "Grandma": "grandma"}

PLACES = """on Zoom|on Teams|at Luigi's|at Café Lumière|at the Red Lion|at the Blue Door|at Harbour St|at King's Cross
at Mill Lane|at the office|at the library|at the town hall|at Nando's|at Bar Ødegård|at Plaza Mayor|at the Old Mill
at St Mary's|at the clinic|at the park|at Parkside|at the Corner House|at Sakura|at Green Leaf|at the station
at Gate 12|at Il Forno|at Bella Vista|at the museum|at the Grand Hotel|at Elm Road|at Oak Street|at Queen's Square
at the sports centre|at Riverside|at the beach|at Blue Bottle|at El Camino|at Le Petit Four|at the workshop|at Pier 7
at the Kraków office|at the Malmö office|at the São Paulo office|at Schönbrunn|at Hackney Wick|at the White Horse
in the lobby|in the canteen|in the boardroom|in the big meeting room|in the garden""".replace("\n", "|").split("|")

WORK = ["standup", "all hands", "performance review", "team lunch", "offsite", "town hall meeting", "code review"]
WORK_TOPICS = """budget design sprint hiring marketing product sales security quarterly strategy onboarding vendor
client research launch roadmap pricing legal press data""".split()
WORK_BASES = "review meeting call workshop planning sync demo retro briefing interview".split()
EVENING = """dinner|drinks|cinema|movie night|book club|poker night|date night|concert|pub quiz|theatre|karaoke
salsa class|choir practice|board games|barbecue|curry night|quiz night|film club""".replace("\n", "|").split("|")
MORNING = """breakfast|morning run|school run|sunrise yoga|parkrun|farmers market|boot camp|bird watching
brunch""".replace("\n", "|").split("|")
DAYTIME = """dentist appointment|haircut|eye test|car service|vet appointment|doctor's appointment|physio|playdate
flat viewing|driving lesson|picnic|blood test|passport appointment|boiler service|parents' meeting|job interview
bank appointment|mortgage meeting|lunch|school tour|delivery slot|site visit""".replace("\n", "|").split("|")
OPEN = """gym|yoga|run|piano lesson|guitar lesson|spanish class|coffee|video call|therapy|training|swimming|tennis
football|band practice|phone call|pilates|climbing|violin lesson|catch-up|language exchange|dog training
badminton|pottery class|walk""".replace("\n", "|").split("|")
NO_ARTICLE = set("""dinner drinks cinema theatre karaoke breakfast brunch lunch physio gym yoga therapy training
swimming tennis football pilates climbing badminton coffee parkrun choir practice board games band practice
sunrise yoga bird watching dog training salsa boot camp team lunch""".split()) | {"board games", "choir practice",
                                                                               "band practice", "sunrise yoga"}

TOPICS = """the invoice|the rent|the contract|the tickets|the broken heater|the holiday|the deposit|the key|the kids
the recipe|the school trip|the refund|the visa|the parking permit|the wifi|the photos|the move
the new sofa""".replace("\n", "|").split("|")
THINGS = """milk|bread|eggs|cat food|stamps|flowers|batteries|a cake|the dry cleaning|the parcel|my prescription
the kids|light bulbs|olive oil|printer ink|a birthday card|nappies|sunscreen|the bike|oat milk|rice|tomatoes
coffee beans|washing powder|toilet paper|bananas|onions|cheese|yoghurt|pasta""".replace("\n", "|").split("|")
GROCERIES = [t for t in THINGS if " " not in t or t in ("cat food", "olive oil", "oat milk", "coffee beans",
                                                        "washing powder", "toilet paper", "light bulbs")]
CHORES = """water the plants|take out the bins|take out the recycling|feed the cat|feed the fish|walk the dog
charge the car|charge the drill|clean the oven|clean the gutters|defrost the chicken|take my pills|move the car
cancel the free trial|cancel the gym membership|book the train tickets|book the hotel|renew my passport
renew the insurance|return the library books|return the drill|submit the tax form|submit the timesheet
print the boarding passes|check the tyres|check the smoke alarm|order the turkey|back up the laptop|lock the shed
pay the gas bill|pay the water bill|pay the phone bill|pay the rent|pay the nursery|change the bed sheets|iron a shirt
turn off the heating|bring in the washing|update the spreadsheet|schedule the newsletter|invite the neighbours
finish the slides|sign the lease|pack my gym bag|drink some water|stretch|empty the dishwasher|wrap the presents
move the laundry to the dryer|reply to the landlord|delete the old backups""".replace("\n", "|").split("|")
LISTS = ["shopping", "grocery", "camping", "party"]
TIMERS = "pasta|eggs|rice|pizza|laundry|tea|bread|potatoes|cake|meditation".split("|")

# --- days and numbers -------------------------------------------------------------------------------------------------

DAYS = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
DAY_NAMES = dict(zip(DAYS, "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()))
DAY_SHORT = {"mon": ["Mon"], "tue": ["Tue", "Tues"], "wed": ["Wed", "Weds"], "thu": ["Thu", "Thurs"], "fri": ["Fri"],
             "sat": ["Sat"], "sun": ["Sun"]}
DAY_TYPOS = {"mon": "Monady", "tue": "Tuseday", "wed": "Wendsday", "thu": "Thrusday", "fri": "Firday",
             "sat": "Saterday", "sun": "Sundya"}
MONTHS = """January February March April May June July August September October November December""".split()
SMALL = "zero one two three four five six seven eight nine ten eleven twelve".split()

# Words for a number of minutes, besides the form "45 minutes".
DURATIONS = {
    10: ["ten minutes"], 15: ["fifteen minutes", "a quarter of an hour"], 20: ["twenty minutes"],
    30: ["half an hour", "thirty minutes"], 45: ["forty-five minutes", "three quarters of an hour"],
    60: ["an hour", "an hour", "one hour", "1h"],
    90: ["an hour and a half", "1.5 hours", "one and a half hours", "1h30"],
    120: ["two hours", "2 hours", "2h", "a couple of hours"], 180: ["three hours", "3 hours", "3h"],
    240: ["four hours", "4 hours", "half a day"]}

# --- ambiguous phrasings ------------------------------------------------------------------------------------------

# Probability of each reading, in the order of the comment. BARE_HOUR: probability of pm, by hour.
NEXT_WEEKDAY = (0.75, 0.25)   # the one a week after the coming one, or the coming one
HALF_HOUR = (0.85, 0.15)      # "half five": 5:30, or 4:30 as in German, Dutch and the Nordic languages
WEEKEND = (0.75, 0.25)        # Saturday, or Sunday
NUMERIC_DATE = (0.7, 0.3)     # 3/4: the third of April, or March the fourth
MIDNIGHT = (0.7, 0.3)         # "Friday midnight": when Friday ends, or when it begins
FORWARD = (0.65, 0.35)        # "move it forward an hour": later, or earlier
BACK = (0.85, 0.15)           # "move it back an hour": later, or earlier
BIWEEKLY = (0.8, 0.2)         # every two weeks, or twice a week
ATTACHMENT = (0.8, 0.2)       # "email Ana about the demo on Friday": remind on Friday, or the demo is on Friday
BARE_HOUR = {6: 0.85, 7: 0.7, 8: 0.4, 9: 0.1}
FEW_DAYS = {"a couple of days": ((2, 0.9), (3, 0.1)), "a few days": ((3, 0.8), (4, 0.2))}
VAGUE_TIME = {"first thing": (("09:00", 0.8), ("08:00", 0.2)), "after lunch": (("14:00", 0.75), ("13:00", 0.25)),
              "at lunchtime": (("12:00", 0.8), ("13:00", 0.2)), "after work": (("18:00", 0.8), ("17:30", 0.2)),
              "in the late afternoon": (("16:00", 0.7), ("17:00", 0.3)), "eod": (("17:00", 0.9), ("18:00", 0.1)),
              "by end of day": (("17:00", 0.9), ("18:00", 0.1)), "around teatime": (("16:00", 0.7), ("17:00", 0.3)),
              "before lunch": (("11:30", 0.75), ("11:00", 0.25))}

# --- intents: action, weight, kind (how a bare hour is read, unless the title decides it), fixed fields, patterns ---

WHEN = "({on} {at}|{on} {at}|{at} {on}|{dt}|{dt}|{on}|{at})"
INTENTS = [
    ("create", 30, None, {}, [
        "(book|schedule|set up|put in|add|create|arrange|pencil in) {a_event}[ with {people}] WHEN[ {place}]",
        "(book|schedule|set up|add) {a_event} {place} WHEN[ with {people}]",
        "(can|could) you (book|schedule|set up|put in|add) {a_event}[ with {people}] WHEN[ {place}]",
        "{event} with {people} WHEN[ {place}]", "{event} WHEN[ {place}], (put it in|add it|stick it in my diary)",
        "{event} WHEN w/ {people}",
        "I have {a_event}[ with {people}] WHEN[ {place}], (add it|pop it in the calendar)",
        "{people} and I are having {a_event} WHEN[ {place}]",
        "put {event} (in|in my calendar|on the calendar) for {day} {at}",
        "block out {dur} {on} for {event}[ with {people}]", "block {on} {span} for {event}[ {place}]",
        "(book|schedule|add) {a_event} for {dur} {on} {at}[ with {people}]",
        "(I'd like|I want|we need) {a_event} {rep} {at}[ with {people}]",
        "(set up|schedule) {a_event} {rep} {at}[ {place}]", "{rep} {event} {at}[ with {people}]",
        "{people} wants {a_event} {on}, (let's say|say) {time}", "meeting {people} for {event} WHEN[ {place}]",
        "{on} I'm going to {a_event}[ with {people}] {at}[, should take {dur}]",
        "invite {people} to {a_event} I'm holding {on} {at}", "{event} {on} {at}, it'll take {dur}",
        "{event} at {time} and {people} will join, (that's|it's) {on}"]),
    ("remind", 22, "open", {}, [
        "remind me to {task} WHEN", "remind me WHEN to {task}", "WHEN, remind me to {task}",
        "remind me {on} to {task_on}", "remind me to {attached}",
        "(don't let me forget|I need a nudge) to {attached}",
        "(don't let me forget|make sure I remember) to {task} WHEN",
        "I need to {task} WHEN, (remind me|give me a nudge|don't let me forget)",
        "(nudge|ping|poke) me WHEN to {task}", "reminder to {task} WHEN",
        "I (have to|must|should) {task} {on}, remind me {at}", "(can|could) you remind me to {task} WHEN",
        "remind me {rep} {at} to {task}", "remind me to {task} {rep} {at}",
        "remind me about {my_event} {before} before", "remind me {before} before {my_event}[ {on}]",
        "I've got {a_event} {on} {at}, remind me {before} (before|beforehand|ahead of it)",
        "{event} is {on} {at}, (nudge|warn|ping|remind) me {before} before it starts",
        "if I forget to {task} I'm in trouble, so remind me WHEN"]),
    ("move", 13, "open", {}, [
        "(move|push|shift|reschedule) {my_event}[ with {people}] to {to_day}[ at {to_time}]",
        "(move|shift|reschedule) {my_event} {on} to {to_day}[ at {to_time}]",
        "(move|push|shift) {my_event} to {to_time}", "(can|could) we (do|have) {my_event} {to_on} instead[ of {day}]",
        "I can't (make|do) {my_event}[ {on}], (push|move|shift) it to {to_day}[ at {to_time}]",
        "{my_event} {on} has been moved to {to_time}", "(move|make|start|schedule) {my_event} {shift}",
        "(move|shift) {my_event}[ {on}] {shift}", "I'm running late, (make|start) {my_event} {shift}",
        "don't cancel {my_event}, just (move|push) it to {to_day}",
        "{people} can't do {my_event} {on}, (move|push) it to {to_day}",
        "{my_event}[ with {people}] is now at {to_time}[ {to_on}]",
        "(bring|pull) {my_event} (forward|up) to {to_time}", "{my_event} {on}, can it be {shift}"]),
    ("cancel", 9, "open", {}, [
        "cancel {my_event}[ with {people}][ {on}]", "(cancel|delete|scrap|call off) {my_event} {on}[ {at}]",
        "(take|get) {my_event} {on} off (my|the) calendar",
        "I can't make {my_event}[ with {people}] {on}, (cancel it|please drop it)",
        "{my_event} {on} is off, (take it out|remove it)",
        "{my_event} isn't happening (anymore|any more)[, {people} is ill]",
        "forget (about the reminder|the reminder) to {task}", "I already did {task}, so (delete|drop) that reminder",
        "no need to remind me to {task} {on}", "{people} cancelled {my_event} {on}"]),
    ("list", 6, None, {}, [
        "what (have I got|do I have|is on) {on}[ in the {part}]", "what does {day} look like[ in the {part}]",
        "(show|read|give) me (everything|my plans|my calendar) for {day}",
        "anything (in my diary|planned|on the calendar) {on}[ in the {part}]", "how busy am I {on}[ in the {part}]",
        "do I have anything with {people} {on}", "what are {people} and I doing {on}[ in the {part}]"]),
    ("find", 5, None, {"ask": "time"}, [
        "when is {my_event}[ with {people}]", "(what time|when) does {my_event} start[ {on}]",
        "what time is {my_event} {on}", "when am I (seeing|meeting) {people}[ for {event}]",
        "remind me when {my_event} is[ again]"]),
    ("find", 2, None, {"ask": "place"}, [
        "where is {my_event}[ {on}]", "where am I meeting {people}[ for {event}][ {on}]",
        "where do I need to be for {my_event} {on}"]),
    ("find", 2, None, {"ask": "people"}, [
        "who is coming to {my_event}[ {on}]", "who am I (seeing|meeting) {on}[ at {time}]",
        "who's (in|going to|at) {my_event} {on}"]),
    ("free", 6, "open", {}, [
        "am I free WHEN[ for {dur}]", "(do I have|have I got) time for {a_event} {on} {at}",
        "(could|can) I fit in {a_event} {on} {at}", "is {on} {at} (free|open)", "do I have {dur} (free|spare) {on}",
        "{people} wants to meet {on} {at}, am I free"]),
    ("invite", 5, None, {}, [
        "(add|invite) {people} to {my_event}[ {on}]",
        "{people} (should|will|would like to) come to {my_event}[ {on}], add them",
        "(get|loop) {people} in on {my_event}[ {on}]", "send {people} an invite for {my_event} {on}"]),
    ("uninvite", 3, None, {}, [
        "(remove|drop|take) {people} from {my_event}[ {on}]",
        "{people} can't (come to|make) {my_event}[ {on}], take them off",
        "{my_event} {on} goes ahead without {people}", "uninvite {people} from {my_event}[ {on}]"]),
    ("alarm", 4, "morning", {}, [
        "wake me (up |){at}[ {on}]", "set an alarm for {time}[ {on}]", "alarm {at} {rep}",
        "I need to be up by {time} {on}", "(get|wake) me up {rep} {at}"]),
    ("timer", 2, None, {}, [
        "(set|start) a timer for {dur}[ for the {timer}]", "(set|start) a {timer} timer for {dur}",
        "the {timer} needs {dur}, start a timer", "tell me when {dur} (are up|have passed) for the {timer}"]),
    ("add", 5, None, {}, [
        "(add|put) {items} (to|on) (the|my) {list} list",
        "we('re out of| need) {items}, put (it|that) on the {list} list",
        "(can|could) you add {items} to the {list} list", "{list} list: {items}, add (it|them)"]),
    ("none", 3, "open", {}, []),
]
# Messages that ask for nothing, though they mention people, events and times.
SMALL_TALK = [
    "(thanks|cheers), {event} with {people} {on} was (lovely|great|fun)",
    "I (loved|hated) {event} {on}, {people} was so funny",
    "{people} says {event} (got cancelled|was moved) last year too, funny",
    "ha, {people} forgot {event} again, never mind",
    "(that's all|nothing else) for today, thanks a lot for (the help|everything)",
    "I was at {my_event} {on} and it was (fine|too loud|boring)",
    "do you (like|enjoy) {event} as much as {people} does",
    "ignore my last message about {event}, I was talking to {people}"]

OPENERS = ["hey, ", "hi, ", "ok ", "so ", "please ", "quick one: ", "when you get a sec, ", "hello! ", "right, ",
           "oh and ", "one more thing: ", "morning! "]
# Remarks that do not change the answer; some contain irrelevant times and days.
ASIDES = ["just got out of the 3pm call, ", "it's 5 already and I'm still at my desk, ", "long day... ",
          "on the train so short one: ", "sorry to bother you on a Sunday, ", "before I forget, ",
          "spoke to {x} yesterday. ", "{x} just rang. ", "I've had a coffee with {x}, so ",
          "I always mix up my Tuesdays and Thursdays, but ", "ok 2 things, first one: "]
CLOSERS = [" please", " thanks", " thx", " pls", " if you can", ", cheers", " 🙏", " 👍", ", ta"]
FIXES = ["no wait, {new}", "sorry, {new}", "actually, {new}", "actually make (that|it) {new}", "scratch that, {new}",
         "I mean {new}", "no, {new}"]
TYPOS = {"remind": "remnid", "schedule": "shedule", "calendar": "calender", "please": "plese", "meeting": "meetng",
         "reminder": "remider", "about": "abuot", "cancel": "cancle", "before": "befor", "could": "coud",
         "forget": "forgt", "appointment": "apointment", "with": "wiht", "free": "fre", "when": "wehn", "the": "teh",
         "book": "bok"}
