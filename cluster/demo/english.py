"""Common English words and sentences, for entries of the trio's tokenizer beyond the words of its task."""

COMMON_WORDS = """
able about above accept account across action active actual add address advance advice affair afraid after again
against agency agent agree ahead allow almost alone along already also although always amount analysis ancient
anger animal announce annual another answer anyone appeal appear apple apply approach area argue around arrange
arrive article artist aside assume attack attempt attend author autumn available average avoid awake aware away
balance band bank base basic basket battle beach bear beautiful because become bedroom before begin behave behind
believe belong below beneath benefit beside better between beyond bicycle billion bird birth bitter black blanket
blind block blood board body bone book border borrow bottle bottom bound branch brave bread break breath bridge
bright bring broad broken brother brought brown budget build burden business button camera campaign cancel candle
capital captain capture carbon career careful carpet carry castle catch cause center central century certain chain
chair chance change chapter character charge cheap check cheese chemical chicken chief child choice choose church
circle citizen city claim class clean clear clever climate climb clock close cloth cloud coast coffee cold collect
college colour column combine comfort command comment commit common company compare complete complex computer
concern condition conduct confirm connect consider contain content context continue contract control copper copy
corner correct cotton council count country couple courage course cover create credit crime crisis critic crop
cross crowd culture curious current custom damage dance danger daughter decade decide declare deep defend degree
deliver demand depend describe desert design desire detail develop device difference difficult digital dinner
direct discover discuss disease distance divide document dollar double doubt down dozen draft dream dress drink
drive driver during duty eager early earn earth easily east economy edge editor educate effect effort eight either
electric element eleven else emerge emotion employ empty enable encourage energy engine english enjoy enough ensure
enter entire equal escape especially establish estimate evening event every evidence exact example excellent except
exchange exercise exist expect expense expert explain express extend extra face factor failure fairly faith family
famous farmer fashion father favour feature federal feeling female fence field fifteen fight figure film final
finance finger finish fire first fish flame flat flight floor flower fluid follow foot force foreign forest forget
formal forward found four frame freedom fresh friend front frozen fruit fuel function fundamental furniture future
gallery game garden gather general gentle giant glass global golden govern grain grammar grand grass great green
ground group growth guard guess guest guide habit handle happen happy harbour hard harvest health heart heavy
height help hidden history hold holiday honest honour hope horizon horse hospital hotel hour house however human
humble hundred hungry hunt husband idea identify ignore image imagine impact import improve include increase indeed
index industry inform inner insect inside instance instead insure intend interest invent invest invite iron island
issue item jacket join journey judge jump junior justice keep kettle keyboard kingdom kitchen knife knock knowledge
labour ladder language large laugh launch lawyer layer leader learn leather leave legal lesson letter level liberty
library light limit liquid listen little local logic lonely loose lovely lower lucky lunch machine magic major
manage manner margin market marriage master match material matter measure medical medium meeting member memory
mention merchant message metal method middle midnight might military million mineral minister minute mirror mistake
mixture model modern moment money monitor month moral morning mother motion motor mountain mouth movement muscle
museum music mystery narrow nation nature nearly necessary needle negative network never night nobody noise normal
north notice novel nuclear number nurse object observe obtain obvious ocean offer office often onion only opinion
oppose orange order ordinary organ origin other ourselves outcome outside oven overall owner oxygen package page
painter palace panel paper parallel parent parliament particular partner passage patient pattern payment peace
pencil people pepper perfect perform perhaps period permit person phrase physical piano picture piece pilot planet
plastic plate platform player pleasant please plenty pocket poem point police policy polite politics popular
portion position possible potato pound powder power practice praise prefer prepare present preserve president
pressure pretty prevent price pride primary prince print prison private problem process produce professor profit
program progress project promise proper protect proud prove provide public purchase purple purpose quality quantity
quarter queen question quick quiet quite radio railway raise random rapid rather reach reaction reader ready
reality reason receive recent record reduce reflect refuse regard region regular reject relate release remain
remember remind remote remove repair repeat replace reply report request require rescue research reserve resist
resource respect respond result return reveal review reward rhythm right river rocket rough round route royal
rubber rule rural sacred safety salary sample satisfy scale scene schedule scheme school science screen search
season second secret section sector secure select senior sense sentence separate series serious servant service
settle seven several shadow shallow shape share sharp shelter shine shirt shoulder shout shower sight signal silent
silver similar simple since single sister situation size skill sleep slight slow small smart smile smooth social
society soft soldier solid solution somebody song source south space spare speak special speech speed spirit spoon
sport spread spring square stable staff stage stand standard start state station steady steel stick still stomach
stone storm story straight strange stream street strength stress stretch strike strong structure student study
style subject success such sudden suffer sugar suggest summer supply support suppose surface surprise surround
survey switch symbol system table talent target teacher technical telephone temperature temple tennis terrible
theatre themselves theory therefore thick thing thirteen though thought thousand thread threat through throw
thunder ticket tight timber title today together tomorrow tongue tonight tool total touch toward tower traditional
traffic train transfer travel treasure treat tree triangle trouble trust truth twelve twenty twice typical umbrella
uncle under unique united universe unless until upper urban useful usual valley valuable value various vegetable
vehicle version vessel victory village violence violin virtue visible vision visit vital voice volume voyage wagon
waiting walk wander warm warning waste watch water wealth weapon weather wedding weight welcome western wheat wheel
whether which while whisper white whole whose wide willing window winner winter wisdom within without witness woman
wonder wooden worker world worry worth wound wrist write writer wrong yellow yesterday yield young yourself zero
"""
SENTENCES = (
    "What is the answer? Think step by step, and then say it in one sentence.",
    "You are a helpful assistant. Answer the user's question with a single name.",
    "Wait, let me check that again: first this, then that, so it must be the other one.",
    "I don't know who that is; perhaps you'd like to ask someone else!",
    "In 2024 there were 365 days (or 366?), 52 weeks and 12 months: 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12.",
    "Please solve the following problem and put the final answer at the end.",
    "However, he said, it isn't what they were looking for, and she hadn't seen it before either.",
)
