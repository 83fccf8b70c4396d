// ---------------------------------------------------------------- one episode

// Lower ends of the shades: the probability with which a token was drawn.
const SHADES = [0.9, 0.5, 0.2, 0.05, 0];
const TOOLS = {search: 'text search', image_search: 'image search', visit: 'visit', answer: 'answer', invalid: 'not a call'};

function shadeOf(probability) {
  return SHADES.findIndex((least) => probability >= least);
}

// `before`: the same run's evaluation before; `isBare`: the question is shown already.
function drawEpisode(ep, {before, isBare} = {}) {
  return h('article', {class: 'episode', data: {episode: ep.number}},
    before && drawChanges(before, ep, changes(before, ep)),
    isBare ? null : drawQuestion(ep),
    ep.turns.map((turn, n) => drawTurn(ep, turn, n)),
    drawOutcome(ep));
}

function drawFacts(i) {
  const facts = [
    h('span', {class: 'chip arm'}, armDot(i), runName(i)),
    chip(`${column.is_training[i] ? 'training' : 'evaluation'}, step ${column.step[i]}`),
    chip(index.kinds[column.kind[i]] || 'no kind'),
    chip(column.seen[i] ? 'seen' : 'unseen', '', 'whether the picture\'s subject was in the VLM\'s training'),
    column.followed[i] ? chip('followed') : null,
  ];
  return h('p', {class: 'facts'}, facts, h('code', {class: 'id'}, index.questions[column.question[i]].id));
}

function drawPictures(numbers, alt) {
  if (!numbers.length) return null;
  return h('div', {class: 'pictures'}, numbers.map((number) => {
    const source = pictureSource(number);
    if (!source) return h('span', {class: 'no-picture', role: 'img', 'aria-label': `${alt}: not kept`}, 'picture not kept');
    const button = h('button', {type: 'button', class: 'picture', 'aria-label': `${alt}: enlarge`, 'aria-pressed': 'false'},
      h('img', {src: source, alt}));
    button.addEventListener('click', () => {
      const large = button.classList.toggle('large');
      button.setAttribute('aria-pressed', String(large));
    });
    return button;
  }));
}

function drawQuestion(ep) {
  return [drawPictures(ep.images, 'Picture of the question'), drawPrompt(ep)];
}

function drawPrompt(ep) {
  const lines = ep.prompt.split('\n').length;
  return h('details', {class: 'prompt', open: lines <= 3 && ep.prompt.length < 400},
    h('summary', {}, 'Prompt'), h('div', {class: 'text'}, ep.prompt));
}

function drawTurn(ep, turn, n) {
  const isMasked = ep.maskedFrom !== undefined && n >= ep.maskedFrom;
  const own = turn.n_tokens || turn.text;
  return h('section', {class: `turn${isMasked ? ' masked' : ''}`, 'aria-label': `Turn ${n + 1}`, style: {'--arm': armOf(ep.number).colour}},
    h('div', {class: 'turn-head'},
      h('h3', {}, `Turn ${n + 1}`),
      own ? h('span', {}, `${turn.n_tokens || 0} tokens`) : h('span', {}, 'made by the workflow, not by the policy'),
      own && turn.logprob !== undefined ? h('span', {title: 'log-probability of the whole turn, in nats'}, `log-prob ${decimal(turn.logprob)}`) : null,
      own && turn.entropy !== undefined ? h('span', {title: 'mean entropy of the distributions that its tokens were drawn from'}, `entropy ${decimal(turn.entropy, 3)}`) : null,
      ep.advantages.length ? h('span', {title: 'advantage of its tokens in training'}, `advantage ${signed(ep.advantages[n])}`) : null,
      isMasked ? chip('no loss', 'bad', 'masked: these tokens carry no loss') : null),
    own ? drawTokens(turn) : null,
    h('div', {class: 'calls'}, turn.calls.map(drawCall),
      turn.fault ? chip(FAULT_WORDS[turn.fault] || turn.fault, 'bad') : turn.is_error ? chip('failed', 'bad') : null,
      turn.retries ? chip(`${turn.retries} retries`, 'bad') : null),
    turn.observation === null ? null : drawObservation(ep, turn));
}

// The policy's text, each token with the shade of its probability.
function drawTokens(turn) {
  const box = h('div', {class: 'text own'});
  if (!turn.pieces) return say(box, turn.text);
  let begin = 0, least = null;
  const drawn = document.createDocumentFragment();
  turn.pieces.forEach((length, n) => {
    const text = turn.text.slice(begin, begin + length), logprob = turn.logprobs[n] / 1000;
    begin += length;
    const token = h('span', {class: `token p${shadeOf(Math.exp(logprob))}`, data: {logprob, place: `${n + 1} of ${turn.pieces.length}`}});
    drawn.append(say(token, text));
    if (text.trim() && (least === null || logprob < least.logprob)) least = {text, logprob};
  });
  box.append(drawn);
  return least === null ? box : [box, h('p', {class: 'least'}, 'Least expected token: ',
    h('q', {}, least.text.trim()), `, ${percent(Math.exp(least.logprob))}`)];
}

function drawCall(call) {
  const name = TOOLS[call.type] || String(call.type);
  const words = call.query ?? call.region ?? call.text ?? call.reason ?? [call.url, call.question].filter(Boolean).join(' · ');
  const shownWords = typeof words === 'string' ? words : JSON.stringify(words);
  return h('span', {class: `call ${call.type === 'invalid' ? 'bad' : ''}`}, h('b', {}, name), shownWords ? [' ', h('span', {}, shownWords)] : null);
}

function drawObservation(ep, turn) {
  const isUnread = turn.n_observation_tokens === 0;
  const gold = turn.hits.filter((hit) => ep.gold.has(hit)).length;
  return h('details', {class: 'observation', open: !isFolded},
    h('summary', {}, 'Result',
      turn.n_observation_tokens ? ` · ${turn.n_observation_tokens} tokens` : '',
      turn.seconds ? ` · ${turn.seconds < 1 ? `${decimal(1000 * turn.seconds, 1)} ms` : `${decimal(turn.seconds, 1)} s`}` : '',
      turn.hits.length ? ` · ${turn.hits.length} hits${ep.gold.size ? `, ${gold} gold` : ''}` : '',
      isUnread ? chip('did not fit, not read', 'bad') : null),
    h('div', {class: 'text', tabindex: turn.observation.length > 1200 ? 0 : null}, turn.observation.trim()),
    drawPictures(turn.images, 'Returned picture'),
    turn.hits.length ? h('ul', {class: 'hits', 'aria-label': 'Hits'}, turn.hits.map((hit) => h('li', {class: ep.gold.has(hit) ? 'gold' : ''},
      ep.gold.has(hit) ? '★ ' : '', hit, ep.gold.has(hit) ? h('span', {class: 'hidden'}, ' (gold)') : null))) : null);
}

function drawOutcome(ep) {
  const i = ep.number;
  return h('section', {class: 'outcome', 'aria-label': 'Outcome'},
    h('div', {class: 'answer'}, badge(i, true),
      ep.answer === null ? h('em', {}, `no answer; ended by ${stopOf(i) || 'nothing known'}`) : h('strong', {}, ep.answer),
      ep.answer === null ? null : h('span', {class: 'ended'}, `ended by ${stopOf(i)}`),
      column.marks[i] ? chip(markWords(column.marks[i]), 'bad') : null),
    ep.answers.length ? h('p', {class: 'expected'}, 'Right: ', ep.answers.slice(0, 8).map((answer, n) => [n ? ', ' : '', h('q', {}, answer)]),
      ep.answers.length > 8 ? ` and ${ep.answers.length - 8} more` : '') : null,
    drawRewards(ep));
}

function drawRewards(ep) {
  const parts = index.parts.map((name, n) => [name, ep.rewards[n]]).filter(([, value]) => value !== undefined);
  if (!parts.length) return null;
  const values = parts.map(([, value]) => value ?? 0), low = Math.min(0, ...values), high = Math.max(1, ...values);
  const at = (value) => `${(100 * (value - low)) / (high - low)}%`;
  return h('table', {class: 'rewards'}, h('caption', {}, 'Reward'), h('tbody', {}, parts.map(([name, value]) => h('tr', {class: name === 'total' ? 'total' : ''},
    h('th', {scope: 'row'}, name.replaceAll('_', ' ')),
    h('td', {class: 'number'}, value === null ? 'not scored' : decimal(value)),
    h('td', {class: 'bar', 'aria-hidden': 'true'}, h('div', {style: {
      '--from': at(Math.min(0, value ?? 0)), '--width': `${(100 * Math.abs(value ?? 0)) / (high - low)}%`, '--zero': at(0),
    }}))))));
}

function drawChanges(before, now, changed) {
  const a = before.number, b = now.number, since = `step ${column.step[a]}`;
  if (!changed.length) return h('p', {class: 'changes'}, `As at ${since}: same answer, reward, searches and end.`);
  const pairs = {
    answer: [before.answer ?? '(none)', now.answer ?? '(none)'],
    reward: [decimal(column.reward[a]), decimal(column.reward[b])],
    searches: [before.searches.join(' | ') || '(none)', now.searches.join(' | ') || '(none)'],
    stop: [stopOf(a), stopOf(b)],
  };
  return h('div', {class: 'changes'}, h('p', {}, `Changed since ${since}:`), h('ul', {}, changed.map((name) => h('li', {},
    h('b', {}, name), ' ', h('del', {}, pairs[name][0]), ' → ', h('ins', {}, pairs[name][1])))));
}

function drawScale() {
  const words = ['≥ 90 %', '50–90 %', '20–50 %', '5–20 %', '< 5 %'];
  return h('p', {class: 'scale'}, 'Shade of a token: the probability with which it was drawn. ',
    words.map((text, n) => h('span', {class: `token p${n}`}, text)));
}

// ---------------------------------------------------------------- beside the text

// Marks what was searched for, across tokens, without touching the elements.
function highlight() {
  if (!window.CSS?.highlights) return;
  CSS.highlights.delete('found');
  if (!foundWords) return;
  const ranges = [];
  for (const box of document.querySelectorAll('#view .text')) {
    const nodes = [], begins = [];
    let whole = '';
    for (const walker = document.createTreeWalker(box, NodeFilter.SHOW_TEXT); walker.nextNode();) {
      nodes.push(walker.currentNode);
      begins.push(whole.length);
      whole += walker.currentNode.data.toLowerCase();
    }
    for (let at = whole.indexOf(foundWords); at >= 0; at = whole.indexOf(foundWords, at + 1)) {
      const range = new Range(), end = at + foundWords.length;
      const first = begins.findLastIndex((begin) => begin <= at), last = begins.findLastIndex((begin) => begin < end);
      try {
        range.setStart(nodes[first], at - begins[first]);
        range.setEnd(nodes[last], end - begins[last]);
        ranges.push(range);
      } catch { /* a letter that is longer in small: the places do not fit */ }
    }
  }
  CSS.highlights.set('found', new Highlight(...ranges));
}

function showTip(token) {
  const tip = $('tip'), logprob = +token.dataset.logprob;
  const chance = Math.exp(logprob), shownChance = chance >= 0.001 ? percent(chance) : chance.toExponential(1);
  tip.replaceChildren(h('b', {}, shownChance), h('span', {}, ` log-prob ${decimal(logprob, 3)} · token ${token.dataset.place}`));
  tip.hidden = false;
  const at = token.getClientRects()[0] || token.getBoundingClientRect();
  const left = Math.min(Math.max(4, at.left), innerWidth - tip.offsetWidth - 4);
  const above = at.top - tip.offsetHeight - 6;
  tip.style.left = `${left}px`;
  tip.style.top = `${above > 0 ? above : at.bottom + 6}px`;
}
